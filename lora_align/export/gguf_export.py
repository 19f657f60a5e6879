"""The command `export --gguf`: one file of a mix, or one file a vector whose scales llama.cpp can change."""

import json
import re
from pathlib import Path
from shlex import quote

from transformers import AutoConfig

from lora_align import store
from lora_align.adapters.streamed_merge import Merge
from lora_align.commands.push_to_hub import CARD
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.export import FORMATS, ExportOptions, gguf_adapter
from lora_align.export.card import card, file_with_card
from lora_align.export.exported import Exported
from lora_align.export.gguf_adapter import About, Layout
from lora_align.export.source import Source
from lora_align.model.base import gguf_file
from lora_align.model.base_folder import GGUF
from lora_align.policy.policy import START

BASE = "BASE.gguf"  # stands for the base's file in printed commands


def export_gguf(source: Source, target: Path, screen: Screen, how: ExportOptions) -> Exported:
    """Write the whole mix to one GGUF file with its card beside it, or one file a vector to a folder."""
    dtype = how.dtype or FORMATS["--gguf"].dtypes[0]
    if source.base.recipe.chat_template:
        screen.warn("base.chat_template is not part of the files; give it to llama-server with --chat-template-file")
    if how.each:
        return _each(source, target, dtype)
    _refuse_separators(target, ",")
    use = f"{_server(source)} --lora {quote(str(target))}"
    about = f"A LoRA adapter for llama.cpp, the mix {source.weights}."
    with file_with_card(target) as (file, text):
        write_gguf(source, file, source.merge, f"a mix of {source.weights}", dtype, target.stem)
        text.write_text(card(source, about, use), encoding="utf-8")
    return Exported({target: target.stat().st_size}, use)


def write_gguf(source: Source, file: Path, merge: Merge, description: str, dtype: str, name: str) -> None:
    """Write the update of a merge to a GGUF file."""
    layout = Layout.of(AutoConfig.from_pretrained(source.base.folder))
    about = About(name, description, source.base.recipe.model, source.base.fingerprint)
    gguf_adapter.write(file, ((merged.module, merged.factors) for merged in merge.modules()), layout, about, dtype)


def _each(source: Source, folder: Path, dtype: str) -> Exported:
    """Write one GGUF file a vector, so that each request can scale them, and a start adapter if there is one."""
    parts, weights = source.each(), {START: 1.0, **source.policy.weights}
    files = {name: re.sub(r"[^\w@.]+", "-", name).strip("-.") + GGUF for name in parts}
    for name, file in files.items():
        if others := [other for other in files if other != name and files[other].lower() == file.lower()]:
            raise UserError(f"--each: {name} and {others[0]} would both be written to {file}; export one of them alone")
    _refuse_separators(folder, ",:")
    scales = [{"id": number, "scale": weights[name]} for number, name in enumerate(parts)]
    system = [{"role": "system", "content": source.policy.system}] if source.policy.system else []
    request = json.dumps({"messages": [*system, {"role": "user", "content": "Hello"}], "lora": scales})
    adapters = quote(",".join(f"{folder / file}:{weights[name]:.15g}" for name, file in files.items()))
    use = f"{_server(source)} --lora-scaled {adapters}\ncurl localhost:8080/v1/chat/completions -d {quote(request)}"
    about = (
        "LoRA adapters for llama.cpp, one file a vector. Send the scale of every file with each request: without "
        "scales, llama.cpp may continue states that it computed with those of an earlier request."
    )
    with store.exported_folder(folder) as staging:
        for name, file in files.items():
            about_one = f"the vector {name}, to be scaled by a weight"
            write_gguf(source, staging / file, parts[name], about_one, dtype, Path(file).stem)
        (staging / CARD).write_text(card(source, about, use), encoding="utf-8")
    return Exported({folder / file: (folder / file).stat().st_size for file in files.values()}, use)


def _refuse_separators(target: Path, separators: str) -> None:
    for one in separators:
        if one in str(target):
            raise UserError(f"--gguf {target}: llama-server reads {one!r} as the end of a path; give another path")


def _server(source: Source) -> str:
    """Return the beginning of the command that serves the base. Say what stands for its file if it is not known."""
    template = source.base.recipe.chat_template_kwargs
    kwargs = f" --chat-template-kwargs {quote(json.dumps(dict(template)))}" if template else ""
    if file := gguf_file(source.base.recipe):
        return f"llama-server -m {quote(str(file))}{kwargs}"
    note = f"# {BASE} is the base as a GGUF file; llama.cpp's convert_hf_to_gguf.py writes one"
    return f"{note}\nllama-server -m {BASE}{kwargs}"

"""The command `export --gguf`: one file of a mix, or one file a vector whose scales llama.cpp can change."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lora_align import store
from lora_align.adapters.streamed_merge import Merge
from lora_align.export import gguf_adapter
from lora_align.export.card import card
from lora_align.export.gguf_adapter import About, Layout
from lora_align.export.source import Source
from lora_align.model.base import GGUF
from lora_align.policy.policy import START

CARD = "README.md"
BASE = "BASE.gguf"  # stands for the base's file in printed commands


@dataclass(frozen=True)
class Exported:
    """Published files, and how to use them."""

    files: Mapping[Path, int]  # bytes
    use: str

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"files": {str(file): size for file, size in self.files.items()}, "use": self.use}

    def summary(self) -> str:
        """Return each file with its size, and the commands that use them."""
        lines = [f"{file}  {size / 1e6:.1f} MB" for file, size in self.files.items()]
        return "\n".join([*lines, "", self.use])


def export_gguf(source: Source, target: Path, dtype: str) -> Exported:
    """Write the whole mix to one GGUF file, with its card beside it."""
    base = _base_file(source)
    use = f"llama-server -m {base} --lora {target}"
    written = _write(source, target, source.merge, f"a mix of {source.weights}", dtype)
    about = f"A LoRA adapter for llama.cpp, the mix {source.weights}."
    _write_text(target.with_suffix(".md"), card(source, about, use))
    return Exported({target: written}, use)


def export_each(source: Source, folder: Path, dtype: str) -> Exported:
    """Write one GGUF file a vector, so that each request can scale them, and a start adapter if there is one."""
    parts, weights = source.each(), {START: 1.0, **source.policy.weights}
    files = {folder / f"{name.replace('/', '-')}{GGUF}": merge for name, merge in parts.items()}
    scales = [{"id": number, "scale": weights[name]} for number, name in enumerate(parts)]
    base = _base_file(source)
    request = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "lora": scales})
    use = (
        f"llama-server -m {base} --lora {','.join(map(str, files))}\n"
        f"curl localhost:8080/v1/chat/completions -d '{request}'"
    )
    sizes = {
        file: _write(source, file, merge, f"the vector {file.stem}, to be scaled by a weight", dtype)
        for file, merge in files.items()
    }
    about = (
        "LoRA adapters for llama.cpp, one file a vector. Send the scale of every file with each request: llama.cpp "
        "takes a missing one as 0, but an empty list as the scales of its start."
    )
    _write_text(folder / CARD, card(source, about, use))
    return Exported(sizes, use)


def _write(source: Source, target: Path, merge: Merge, description: str, dtype: str) -> int:
    layout = Layout.of(AutoConfig.from_pretrained(source.base.folder))
    about = About(target.stem, description, source.base.recipe.model, source.base.fingerprint)
    modules = ((merged.module, merged.factors) for merged in merge.modules())
    with store.report_write_errors(target, "make room, or write to another disk"), store.new_file(target) as file:
        gguf_adapter.write(file, modules, layout, about, dtype)
    return target.stat().st_size


def _write_text(file: Path, text: str) -> None:
    with store.new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _base_file(source: Source) -> str:
    model = source.base.recipe.model
    return model if model.endswith(GGUF) else BASE

"""The command `export --ollama`: a folder with a Modelfile, and an adapter or a merged model beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote

from lora_align import store
from lora_align.commands.push_to_hub import CARD
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.export import FORMATS, ExportOptions
from lora_align.export.card import card
from lora_align.export.exported import Exported
from lora_align.export.gguf_export import write_gguf
from lora_align.export.merged_export import about_model, write_model
from lora_align.export.ollama_template import Joints
from lora_align.export.source import Source
from lora_align.model.base import gguf_file
from lora_align.model.chat_format import text_of

ADAPTER, MODEL = "mix.gguf", "model"  # in the folder
QUOTES = '"""'


def export_ollama(source: Source, folder: Path, screen: Screen, how: ExportOptions) -> Exported:
    """Write the folder: with an adapter if the base is a GGUF file, else with the merged model."""
    base = gguf_file(source.base.recipe)
    if base and (how.dtype or how.dequantised):
        option = "--dtype" if how.dtype else "--dequantised"
        raise UserError(f"{option} has no effect: the base is a GGUF file, so the Modelfile names an adapter")
    name = source.name.lower()
    use = f"ollama create {name} -f {quote(str(folder / 'Modelfile'))}\nollama run {name}"
    figures: Mapping[str, float] = {}
    settings = list(_settings(source, screen))
    with store.exported_folder(folder) as staging:
        if base:
            about, dtype = f"a mix of {source.weights}", FORMATS["--gguf"].dtypes[0]
            write_gguf(source, staging / ADAPTER, source.merge, about, dtype, source.name)
            lines = [f"FROM {base.resolve()}", f"ADAPTER ./{ADAPTER}"]
        else:
            figures = write_model(source, staging / MODEL, folder, screen, how)
            lines = [f"FROM ./{MODEL}"]
        (staging / "Modelfile").write_text("\n".join([*lines, *settings]) + "\n", encoding="utf-8")
        about = f"A model for Ollama. {about_model(source, how)}."
        (staging / CARD).write_text(card(source, about, use, figures), encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return Exported({folder: sum(file.stat().st_size for file in files)}, use, figures)


def _settings(source: Source, screen: Screen) -> Iterator[str]:
    """Yield the Modelfile's system message of a conditioned policy, its template and its stop texts."""
    if system := source.policy.system:
        if QUOTES in system:
            raise UserError(f"--ollama: the system message contains {QUOTES}, which a Modelfile cannot quote")
        yield f"SYSTEM {QUOTES}{system}{QUOTES}"
    chat = source.base.chat
    try:
        template = Joints.of(chat).template()
        if QUOTES in template:
            raise UserError(f"it contains {QUOTES}")
        yield f"TEMPLATE {QUOTES}{template}{QUOTES}"
    except UserError as fault:
        screen.warn(f"the chat template was not translated: {fault}; Ollama will choose a template by itself")
    for stop in sorted(chat.stop_ids):
        yield f'PARAMETER stop "{text_of(chat.tokenizer, [stop])}"'

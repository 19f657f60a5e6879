"""Write the card of an export: its base, its vectors with their weights and data, and the measured safe weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import yaml
from huggingface_hub import ModelCard

from lora_align import __version__, runs, store
from lora_align.adapters.peft_config import WEIGHTS
from lora_align.commands.push_to_hub import data_lines, literal
from lora_align.export.source import Source
from lora_align.model.base import Base, gguf_file
from lora_align.model.base_folder import is_hub_id
from lora_align.policy import safe_ranges
from lora_align.policy.vectors import Vector
from lora_align.runs import Run

CARD = "README.md"  # in an exported folder, and in a base of the hub


def card(source: Source, about: str, use: str, figures: Mapping[str, float] | None = None) -> str:
    """Return the card in Markdown. `about` says what was exported, `use` how to run it, `figures` what was measured."""
    base, system = source.base, source.policy.system
    lines = [
        f"# {source.name}",
        f"{about} Made with lora-align {__version__}.",
        f"```\n{use}\n```",
        *([f"Begin each conversation with the system message {literal(system)}."] if system else []),
        "## Base",
        f"{literal(base.recipe.model)}. Hash of its weights: {literal(base.fingerprint)}. Licence: {_licence(base)}.",
        "## Vectors",
        "\n".join(_vector_lines(source)),
        *(["## Measured", "\n".join(f"- {name}: {value:.3g}" for name, value in figures.items())] if figures else []),
        "The licences of the base and of the data apply.",
    ]
    return "\n\n".join(lines) + "\n"


def _licence(base: Base) -> str:
    """Return the licence that the base's files state, or where to look."""
    if file := gguf_file(base.recipe):
        field = gguf.GGUFReader(file).get_field(gguf.Keys.General.LICENSE)
        stated = field.contents() if field else ""
    else:
        stated = _licence_of_card(base.folder / CARD)
    page = f"; see https://huggingface.co/{base.recipe.model}" if is_hub_id(base.recipe.model) else ""
    return literal(stated) or f"not stated in its files{page}"


def _licence_of_card(readme: Path) -> str:
    """Return the licences in the metadata of a base's card."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not text.startswith("---"):
        return ""
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError):
        return ""
    stated = data.get("license_name") or data.get("license") or ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)


def write_beside(file: Path, text: str) -> None:
    """Write a card beside an exported file, under its name with the suffix .md."""
    with store.new_file(file.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _vector_lines(source: Source) -> Iterator[str]:
    for name, vector in source.policy.vectors.items():
        yield f"- {literal(name)}: weight {source.policy.weights[name]:.15g}{_safe(vector, source)}"
        for run in vector.known_runs():
            yield from _data_of(run, source.runs_dir)


def _data_of(run: Run, runs_dir: Path) -> Iterator[str]:
    """Yield a line for each dataset of a run. For a mix, yield its vectors and the datasets of their runs."""
    path = run.path.relative_to(runs_dir) if run.path.is_relative_to(runs_dir) else run.path
    for line in data_lines(run.manifest.data):
        yield f"  - {literal(path)} was trained on {line}"
    for vector in run.manifest.parents:
        yield f"  - {literal(path)} has {literal(vector['name'])} with weight {vector['weight']:.15g}"
        for adapter in vector["adapters"]:
            folder = Path(adapter["folder"])
            parent = runs.read(folder) if runs.is_run(folder) else None
            if parent and parent.manifest.files[WEIGHTS]["sha256"] == adapter["sha256"]:
                yield from _data_of(parent, runs_dir)
            else:
                yield f"  - {literal(folder)} is not there any more, so its data is unknown"


def _safe(vector: Vector, source: Source) -> str:
    found = safe_ranges.measured(vector, source.runs_dir)
    if found is None:
        return "; its safe weights were not measured (`lora-align reach`)"
    reach, run = found
    return f"; safe from {-reach.down.to + 0.0:g} to {reach.up.to:g}, measured {run.manifest.created[:10]}"

"""Write the card of an export: its base, its vectors with their weights and data, and the measured safe weights."""

import re
from collections.abc import Iterator
from pathlib import Path

import gguf

from lora_align import __version__, store
from lora_align.commands.push_to_hub import data_lines, literal
from lora_align.export.source import Source
from lora_align.model.base import Base, gguf_file
from lora_align.model.base_folder import is_hub_id
from lora_align.policy import safe_ranges
from lora_align.policy.vectors import Vector

CARD = "README.md"  # in an exported folder, and in a base of the hub
STATED = re.compile(r"\A---\n(?:.*\n)*?license: *(\S.*)\n")  # in the front matter of a base's card


def card(source: Source, about: str, use: str) -> str:
    """Return the card in Markdown. `about` says what was exported, `use` shows how to run it."""
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
        "The licences of the base and of the data apply.",
    ]
    return "\n\n".join(lines) + "\n"


def _licence(base: Base) -> str:
    """Return the licence that the base's files state, or where to look."""
    if file := gguf_file(base.recipe):
        field = gguf.GGUFReader(file).get_field(gguf.Keys.General.LICENSE)
        stated = field.contents() if field else ""
    else:
        readme = base.folder / CARD
        found = STATED.search(readme.read_text(encoding="utf-8")) if readme.is_file() else None
        stated = found[1] if found else ""
    page = f"; see https://huggingface.co/{base.recipe.model}" if is_hub_id(base.recipe.model) else ""
    return literal(stated) or f"not stated in its files{page}"


def write_beside(file: Path, text: str) -> None:
    """Write a card beside an exported file, under its name with the suffix .md."""
    with store.new_file(file.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _vector_lines(source: Source) -> Iterator[str]:
    for name, vector in source.policy.vectors.items():
        yield f"- {literal(name)}: weight {source.policy.weights[name]:g}{_safe(vector, source)}"
        for run in vector.known_runs():
            for line in data_lines(run.manifest.data):
                yield f"  - {literal(run.path.name)} was trained on {line}"
            yield from (f"  - {literal(of['name'])}: weight {of['weight']:g}" for of in run.manifest.parents)


def _safe(vector: Vector, source: Source) -> str:
    found = safe_ranges.measured(vector, source.runs_dir)
    if found is None:
        return "; its safe weights were not measured (`lora-align reach`)"
    reach, run = found
    return f"; safe from {-reach.down.to + 0.0:g} to {reach.up.to:g}, measured {run.manifest.created[:10]}"

"""Write the card of an export: its base, its vectors with their weights and data, and the measured safe weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from lora_align import __version__, store
from lora_align.commands.push_to_hub import CARD, data_lines, licence_of_card, literal
from lora_align.errors import UserError
from lora_align.export.source import Source
from lora_align.model.base import Base, gguf_file
from lora_align.model.base_folder import hub_id
from lora_align.policy import safe_ranges, vectors
from lora_align.policy.policy import is_made_of
from lora_align.policy.vectors import Vector
from lora_align.runs import Run


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
        stated = licence_of_card(base.folder / CARD)
    page = f"; see https://huggingface.co/{hub_id(base.recipe.model)}" if hub_id(base.recipe.model) else ""
    return literal(stated) or f"not stated in its files{page}"


@contextmanager
def file_with_card(file: Path) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths of an exported file and of its card, NAME.md. When the block ends, publish both.

    Both are synced before, so that a full disk leaves neither. A file whose card cannot be published is deleted.
    """
    beside, published = file.with_suffix(".md"), False
    try:
        with store.new_file(beside, replace=False) as text:
            with store.new_file(file, replace=False) as temporary:
                yield temporary, text
                store.sync(text)
            published = True
    except BaseException:
        if published:
            file.unlink()
        raise


def _vector_lines(source: Source) -> Iterator[str]:
    if source.start:
        yield "- the start adapter: weight 1"
        yield from _data_of(source.start, source.runs_dir)
    for name, vector in source.policy.vectors.items():
        yield f"- {literal(name)}: weight {source.policy.weights[name]:.15g}{_safe(vector, source.runs_dir)}"
        for run in vector.known_runs():
            yield from _data_of(run, source.runs_dir)


def _data_of(run: Run, runs_dir: Path) -> Iterator[str]:
    """Yield a line for each dataset of a run. For a mix, yield its vectors and the datasets of their runs."""
    path = run.path.relative_to(runs_dir) if run.path.is_relative_to(runs_dir) else run.path
    for line in data_lines(run.manifest.data):
        yield f"  - {literal(path)} was trained on {line}"
    for part in run.manifest.parents:
        vector = _still_there(part, runs_dir)
        safe = _safe(vector, runs_dir) if vector else "; its adapters are not there any more, so its data is unknown"
        yield f"  - {literal(path)} has {literal(part['name'])} with weight {part['weight']:.15g}{safe}"
        for parent in vector.known_runs() if vector else ():
            yield from _data_of(parent, runs_dir)


def _still_there(part: Mapping[str, Any], runs_dir: Path) -> Vector | None:
    """Return the vector that a mix's manifest names; None if its adapters were removed or trained again."""
    try:
        vector = vectors.find(part["name"], runs_dir)
    except UserError:
        return None
    return vector if is_made_of(vector, part["adapters"]) else None


def _safe(vector: Vector, runs_dir: Path) -> str:
    found = safe_ranges.measured(vector, runs_dir)
    if found is None:
        return "; its safe weights were not measured (`lora-align reach`)"
    reach, run = found
    return f"; safe from {-reach.down.to + 0.0:g} to {reach.up.to:g}, measured {run.manifest.created[:10]}"

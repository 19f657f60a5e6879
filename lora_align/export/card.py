"""Write the card of an export: its base, its vectors with their weights and data, and the measured safe weights."""

from collections.abc import Iterator

from lora_align import __version__
from lora_align.commands.push_to_hub import data_lines, literal
from lora_align.export.source import Source
from lora_align.policy import safe_ranges
from lora_align.policy.vectors import Vector


def card(source: Source, about: str, use: str) -> str:
    """Return the card in Markdown. `about` says what was exported, `use` shows how to run it."""
    base = source.base
    lines = [
        f"# {source.name}",
        f"{about} Made with lora-align {__version__}.",
        f"```\n{use}\n```",
        "## Base",
        f"{literal(base.recipe.model)}. Hash of its weights: {literal(base.fingerprint)}.",
        "## Vectors",
        "\n".join(_vector_lines(source)),
        "The licences of the base and of the data apply: see their pages.",
    ]
    return "\n\n".join(lines) + "\n"


def _vector_lines(source: Source) -> Iterator[str]:
    for name, vector in source.policy.vectors.items():
        yield f"- {literal(name)}: weight {source.policy.weights[name]:g}{_safe(vector, source)}"
        for run in vector.known_runs():
            yield from (f"  - {literal(run.path.name)} was trained on {line}" for line in data_lines(run.manifest.data))
            yield from (f"  - {literal(of['name'])}: weight {of['weight']:g}" for of in run.manifest.parents)


def _safe(vector: Vector, source: Source) -> str:
    found = safe_ranges.measured(vector, source.runs_dir)
    if found is None:
        return "; its safe weights were not measured (`lora-align reach`)"
    reach, run = found
    return f"; safe from {-reach.down.to + 0.0:g} to {reach.up.to:g}, measured {run.manifest.created[:10]}"

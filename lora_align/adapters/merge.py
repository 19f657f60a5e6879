"""From weights to a mix: name the vectors, add them up, and say what a smaller rank leaves out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_align.adapters.delta import LoraDelta, total
from lora_align.errors import UserError


@dataclass(frozen=True)
class Merged:
    """A sum, and the share of its energy that truncation left out."""

    delta: LoraDelta
    left_out: float


def parse_weights(text: str) -> dict[str, float]:
    """Read `helpful=1,harmless=-0.5`."""
    weights: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name.strip() or not math.isfinite(weight):
            raise UserError(f"weights: {part!r}: expected NAME=NUMBER, as in helpful=1,harmless=0.5")
        if name.strip() in weights:
            raise UserError(f"weights: {name.strip()!r} is given twice")
        weights[name.strip()] = weight
    if not weights:
        raise UserError("weights: none given; as in helpful=1,harmless=0.5")
    return weights


def exact(vectors: Mapping[str, LoraDelta], weights: Mapping[str, float], rank: int | None = None) -> Merged:
    """Σ η·vector by stacking, then, if a rank is asked for, the nearest sum of that rank."""
    whole = total([vectors[name] * weight for name, weight in weights.items()])
    if rank is None or rank >= whole.rank:
        return Merged(whole, 0.0)
    cut = whole.truncated(rank)
    return Merged(cut, cut.left_out(whole))

"""Ways to make one update of several vectors and their weights, and what a smaller rank leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_align.adapters.delta import LoraDelta, total


@dataclass(frozen=True)
class Merged:
    """A sum, and the share of its energy that truncation left out."""

    delta: LoraDelta
    left_out: float


def exact(vectors: Mapping[str, LoraDelta], weights: Mapping[str, float], rank: int | None = None) -> Merged:
    """Σ η·vector by stacking, then, if a rank is asked for, the nearest sum of that rank."""
    whole = total([vectors[name] * weight for name, weight in weights.items()])
    if rank is None or rank >= whole.rank:
        return Merged(whole, 0.0)
    cut = whole.truncated(rank)
    return Merged(cut, cut.left_out(whole))

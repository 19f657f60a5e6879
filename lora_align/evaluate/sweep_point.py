"""A point of a sweep: a policy, its weights, and everything measured of it."""

from dataclasses import dataclass

from lora_align.evaluate.figures import Figures
from lora_align.evaluate.grid import Weights
from lora_align.evaluate.measure import Measured
from lora_align.want import Want


@dataclass(frozen=True)
class SweepPoint:
    """`weights` where it belongs to the grid, `want` where a policy was asked; `wins` are against the start policy."""

    word: str
    weights: Weights | None
    want: Want | None
    measured: Measured
    figures: Figures
    wins: Figures

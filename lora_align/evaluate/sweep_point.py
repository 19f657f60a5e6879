"""A point of a sweep: a contestant with its weights, and all that was found of it."""

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

"""The grid of a sweep: parse its axes, and combine their values into weights."""

import itertools
import math
from collections.abc import Mapping, Sequence

from lora_align.errors import UserError
from lora_align.mix_weights import NAME
from lora_align.policy.policy import START

Weights = Mapping[str, float]
MAX_POLICIES = 1000


def grid(axes: Sequence[str]) -> tuple[dict[str, list[float]], list[Weights]]:
    """Parse axes such as `helpful=-1:1:0.5`; return the values of each axis, and every combination of them.

    The step is 0.5 if an axis names none.
    """
    values: dict[str, list[float]] = {}
    for axis in axes:
        name, _, span = axis.partition("=")
        try:
            low, high, step = (*map(float, span.split(":")), 0.5)[: 3 if span.count(":") < 3 else None]
            count = math.floor((high - low) / step + 1e-9) + 1
        except (ValueError, ZeroDivisionError, OverflowError):  # OverflowError: an infinite range
            count = 0
        if not NAME.fullmatch(name.partition("@")[0]) or not span or count < 1:
            raise UserError(f"sweep: {axis!r} is not an axis; expected NAME=FROM:TO:STEP, as in helpful=-1:1:0.5")
        if name in values:
            raise UserError(f"sweep: {name} has two axes; give one range")
        if count > MAX_POLICIES:
            raise UserError(f"sweep: {axis!r} has {count:,} values, more than {MAX_POLICIES:,}; use larger steps")
        values[name] = [round(low + step * place, 6) for place in range(count)]
    combined: list[Weights] = [
        dict(zip(values, weights, strict=True)) for weights in itertools.product(*values.values())
    ]
    if len(combined) > MAX_POLICIES:
        raise UserError(f"sweep: the grid has {len(combined):,} policies, more than {MAX_POLICIES:,}; use larger steps")
    return values, combined


def weights_text(weights: Weights) -> str:
    """Format weights as `eval` reads them, without zeros. If all weights are 0, return `start`."""
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items() if weight) or START

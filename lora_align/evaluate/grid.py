"""The axes of a sweep, and the points of its grid."""

import itertools
import math
from collections.abc import Mapping, Sequence

from lora_align.errors import UserError
from lora_align.policy.policy import START
from lora_align.weights import NAME

Weights = Mapping[str, float]
MOST = 1000  # points


def grid(axes: Sequence[str]) -> tuple[dict[str, list[float]], list[Weights]]:
    """`helpful=-1:1:0.5`, or `helpful=0:1` in steps of a half: the values of each axis, and every combination."""
    values: dict[str, list[float]] = {}
    for axis in axes:
        name, _, span = axis.partition("=")
        try:
            low, high, step = (*map(float, span.split(":")), 0.5)[: 3 if span.count(":") < 3 else None]
            count = math.floor((high - low) / step + 1e-9) + 1
        except (ValueError, ZeroDivisionError):
            count = 0
        if not NAME.fullmatch(name.partition("@")[0]) or not span or count < 1:
            raise UserError(f"sweep: {axis!r} is no axis; as in helpful=-1:1:0.5, from, to, and in what steps")
        if count > MOST:
            raise UserError(f"sweep: {axis!r} has {count:,} values, more than {MOST:,}; take larger steps")
        values[name] = [round(low + step * place, 6) for place in range(count)]
    points: list[Weights] = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    if len(points) > MOST:
        raise UserError(f"sweep: {len(points):,} points are more than {MOST:,}")
    return values, points


def weights_text(weights: Weights) -> str:
    """As `eval` takes it."""
    live = {name: weight for name, weight in weights.items() if weight}
    return ",".join(f"{name}={weight:g}" for name, weight in live.items()) or START

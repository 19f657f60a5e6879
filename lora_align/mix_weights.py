"""Names of preferences and runs, and the syntax of weights: helpful=1,harmless=-0.5."""

import math
import re
from collections.abc import Iterable

from lora_align.errors import UserError

LONGEST = 64  # characters in a name
LARGEST = 64.0  # weight on a server; a much larger one overflows float32
RESERVED = ("start", "base", "mix")  # words that name a policy
NAME_RULE = "1 to 64 characters of a-z 0-9 _ -, starting with a letter or digit"
NAME = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,{LONGEST - 1}}}")


def name_of(parts: Iterable[str]) -> str:
    """Join parts to a valid name; return "" if they have no letter and no digit."""
    joined = "_".join(re.sub(r"[^a-z0-9_-]+", "-", part.lower()) for part in parts)
    return re.sub(r"^[^a-z0-9]+", "", joined)[:LONGEST]


def parse_weights(text: str) -> dict[str, float]:
    """Parse weights such as `helpful=1,harmless=-0.5`. Spaces may replace the commas."""
    weights: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in re.split(r",|(?<=[\d.])\s+(?=\S+=)", text))):
        name, equals, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name.strip() or not math.isfinite(weight):
            raise UserError(f"{part!r}: expected NAME=NUMBER, as in helpful=1,harmless=0.5")
        if name.strip() in weights:
            raise UserError(f"{name.strip()!r} is given twice; give it once")
        weights[name.strip()] = weight
    if not weights:
        raise UserError("the list is empty; expected NAME=NUMBER, as in helpful=1,harmless=0.5")
    return weights

"""A preference is a named axis over answers: where its pairs come from, and which answer wins."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Le

from lora_align.errors import UserError

LONGEST = 64  # characters of a name
NAME = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,{LONGEST - 1}}}")
RANKERS = ("label", "label:COLUMN", "shorter", "longer", "rating:NAME", "rating:-NAME", "score:NAME", "score:-NAME")
SCORE = "score_"  # how columns that `score` has written begin


def name_of(parts: Iterable[str]) -> str:
    """A name that a folder may have, made of others."""
    joined = "_".join(re.sub(r"[^a-z0-9_-]+", "-", part.lower()) for part in parts)
    return re.sub(r"^[^a-z0-9]+", "", joined)[:LONGEST]


class Direction(StrEnum):
    """Which way the labels point. `neg` switches them and changes nothing else."""

    pos = "pos"
    neg = "neg"


class Winner(StrEnum):
    """What a value of a label column says of two answers: which is better, if one is."""

    first = "first"
    second = "second"
    tie = "tie"


@dataclass(frozen=True)
class Ranker:
    """How a comparison's winner is found: by a label, by a rating (the lower one if asked), or by length."""

    kind: str
    column: str = ""
    lower: bool = False

    @classmethod
    def parse(cls, text: str) -> "Ranker":
        """Read one of RANKERS; ValueError otherwise."""
        kind, _, column = text.partition(":")
        lower = kind in ("rating", "score") and column.startswith("-")
        column = column[lower:]
        if kind == "score" and column:
            return cls("rating", SCORE + column, lower)
        takes_column = kind in ("label", "rating")
        if (takes_column or (kind in ("shorter", "longer") and not column)) and (kind != "rating" or column):
            return cls(kind, column, lower)
        raise ValueError(f"no ranker {text!r}; one of {', '.join(RANKERS)}")


@dataclass(frozen=True)
class Preference:
    """One `[preferences.NAME]` table of a recipe. `margin` is how far apart two ratings (or lengths) must be.

    Of a data set on the hub `split`, `revision` and `subset` (a part it names, or a folder of it) say what is read.
    `columns` says what a column that is known here is called in the data; with `skip_bad` rows that cannot be read are
    counted instead of refused. `labels` says which answer each value of a label column prefers, as in
    { A = "first", B = "second", C = "tie" }. A table may name other preferences, `of` whose pairs it consists, instead
    of data.
    """

    data: str = ""
    rank: str = "label"
    margin: Annotated[float, Ge(0), Le(1e9)] = 0.0
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    labels: Mapping[str, Winner] = field(default_factory=dict)
    of: tuple[str, ...] = ()

    @property
    def ranker(self) -> Ranker:
        """The parsed `rank`."""
        return Ranker.parse(self.rank)


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

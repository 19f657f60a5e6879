"""How the better of two answers is found: by a label, a rating or the length, and towards it or away from it."""

from dataclasses import dataclass
from enum import StrEnum

RANKERS = ("label", "label:COLUMN", "shorter", "longer", "rating:NAME", "rating:-NAME", "score:NAME", "score:-NAME")
SCORE = "score_"  # prefix of the columns that `score` writes


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

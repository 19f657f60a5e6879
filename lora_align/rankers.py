"""Rankers: find the better of two answers by a label, a rating or the length. Directions of labels."""

from dataclasses import dataclass
from enum import StrEnum

RANKERS = ("label", "label:COLUMN", "shorter", "longer", "rating:NAME", "rating:-NAME", "score:NAME", "score:-NAME")
SCORE = "score_"  # prefix of the columns that `score` writes


class Direction(StrEnum):
    """The direction of the labels. `neg` swaps chosen and rejected and changes nothing else."""

    pos = "pos"
    neg = "neg"


class Winner(StrEnum):
    """The answer that a label prefers."""

    first = "first"
    second = "second"
    tie = "tie"


@dataclass(frozen=True)
class Ranker:
    """A parsed `rank`: by label, by rating, or by length."""

    kind: str
    column: str = ""
    lower: bool = False  # the lower rating wins

    @classmethod
    def parse(cls, text: str) -> "Ranker":
        """Parse one of RANKERS; raise a ValueError for anything else."""
        kind, _, column = text.partition(":")
        lower = kind in ("rating", "score") and column.startswith("-")
        column = column[lower:]
        if kind == "score" and column:
            return cls("rating", SCORE + column, lower)
        takes_column = kind in ("label", "rating")
        if (takes_column or (kind in ("shorter", "longer") and not column)) and (kind != "rating" or column):
            return cls(kind, column, lower)
        raise ValueError(f"no ranker {text!r}; use one of {', '.join(RANKERS)}")

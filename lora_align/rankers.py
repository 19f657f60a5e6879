"""Rankers: find the better of two answers by a label, a rating, a score, or a property of the text.

Equal values are a tie. `Direction` says whether an adapter trains on the labels (pos) or on switched labels (neg).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from lora_align import refusals, text_measures
from lora_align.errors import UserError
from lora_align.plugins import Registry

SCORE = "score_"  # prefix of the columns that `score` writes


class Direction(StrEnum):
    """The direction of the labels. `neg` swaps chosen and rejected and changes nothing else."""

    pos = "pos"
    neg = "neg"

    @classmethod
    def parse(cls, text: str) -> list["Direction"]:
        """Return the directions that `pos`, `neg` or `both` names."""
        if text not in (*cls, "both"):
            raise UserError(f"direction {text!r}: expected pos, neg or both")
        return list(cls) if text == "both" else [cls(text)]


class Winner(StrEnum):
    """The answer that a label prefers."""

    first = "first"
    second = "second"
    tie = "tie"


class TwoAnswers(Protocol):
    """Two answers to one prompt, with labels and ratings by name: a `Comparison` of data/rows.py."""

    @property
    def prompt(self) -> tuple[Any, ...]:
        """Return the turns before the answers."""

    @property
    def answers(self) -> tuple[str, str]:
        """Return the texts of both answers."""

    @property
    def labels(self) -> Mapping[str, int | str | None]:
        """Return the index of the preferred answer, by label column."""

    @property
    def ratings(self) -> Mapping[str, tuple[float, float]]:
        """Return the ratings of both answers, by name; nan if missing."""


@dataclass(frozen=True)
class Criterion:
    """One kind of ranker: how `rank` names it, and a function that returns one value for each answer.

    The answer with the larger value wins. Equal values are a tie, and nan is a missing value. `values` raises a
    ValueError that names the missing label or rating.
    """

    usage: Mapping[str, str]  # how `rank` names it, as in `rating:NAME` and `rating:-NAME` → which answer is better
    values: Callable[[TwoAnswers, str], tuple[float, float]]  # (answers, NAME or "") → a value for each
    lower: bool = False  # the smaller value wins
    figure: str = ""  # suffix of the figure of `eval` that measures the same property; {} is the NAME
    names: Collection[str] | None = None  # the allowed NAMEs; None allows any


def _label(two: TwoAnswers, column: str) -> tuple[float, float]:
    if column not in two.labels and (column or not two.labels):
        hint = f"; if the rows have a column {column!r}, name it with columns = {{ label = {column!r} }}"
        raise ValueError(_missing("label", column, two.labels) + hint * bool(column))
    winner = two.labels[column or next(iter(two.labels))]
    return float(winner == 0), float(winner == 1)


def _rating(two: TwoAnswers, column: str) -> tuple[float, float]:
    if column not in two.ratings:
        raise ValueError(_missing("rating", column, two.ratings))
    return two.ratings[column]


def _score(two: TwoAnswers, column: str) -> tuple[float, float]:
    return _rating(two, SCORE + column)


def _length(two: TwoAnswers, _: str) -> tuple[float, float]:
    first, second = two.answers
    return len(first), len(second)


def _refuses(two: TwoAnswers, _: str) -> tuple[float, float]:
    first, second = (float(refusals.refuses(text)) for text in two.answers)
    return first, second


def _text(two: TwoAnswers, name: str) -> tuple[float, float]:
    measure = text_measures.MEASURES[name].measure
    first, second = map(measure, two.answers)
    return first, second


def _missing(kind: str, column: str, known: Mapping[str, object]) -> str:
    which = f"no {kind} {column!r}" if column else f"no {kind} column"
    return f"{which} in this row (the row has: {', '.join(known) or 'none'})"


RANKERS = Registry(
    "rankers",
    Criterion,
    {
        "label": Criterion(
            {
                "label": "the chosen answer (default); for rows with a label column, the answer that it names",
                "label:COLUMN": "the answer that this label column names",
            },
            _label,
        ),
        "shorter": Criterion({"shorter": "the answer with fewer characters"}, _length, lower=True, figure="words"),
        "longer": Criterion({"longer": "the answer with more characters"}, _length, figure="words"),
        "refuses": Criterion(
            {"refuses": "the answer that refuses, if exactly one does"}, _refuses, figure="refused risky"
        ),
        "rating": Criterion(
            {"rating:NAME": "the answer with the higher rating", "rating:-NAME": "the answer with the lower rating"},
            _rating,
            figure=": {}",
        ),
        "score": Criterion(
            {
                "score:NAME": "the answer with the higher score by `lora-align score`",
                "score:-NAME": "the answer with the lower score by `lora-align score`",
            },
            _score,
            figure=": {}",
        ),
        "text": Criterion(
            {
                "text:MEASURE": "the answer with more of a measured property, such as `text:questions`",
                "text:-MEASURE": "the answer with less of it, such as `text:-readability`",
            },
            _text,
            figure="text:{}",
            names=text_measures.MEASURES,
        ),
    },
)


@dataclass(frozen=True)
class Ranker:
    """A parsed `rank`: the name of a criterion, and the column that it reads."""

    kind: str
    column: str = ""
    lower: bool = False  # the smaller value wins

    @classmethod
    def parse(cls, text: str) -> "Ranker":
        """Parse a `rank`, such as `label` or `rating:-NAME`; raise a ValueError for anything else."""
        kind, _, column = text.partition(":")
        criterion = RANKERS.get(kind)
        endings = [usage.removeprefix(kind) for usage in criterion.usage] if criterion else []
        minus = column.startswith("-") and any(ending.startswith(":-") for ending in endings)
        column = column[minus:]
        if criterion and column and criterion.names is not None and column not in criterion.names:
            known = ", ".join(f"{kind}:{name}" for name in criterion.names)
            raise ValueError(f"no {kind}:{column}; use one of {known}")
        if criterion and ("" in endings if not column else any(ending.startswith(":") for ending in endings)):
            return cls(kind, column, criterion.lower != minus)
        raise ValueError(f"no ranker {text!r}; use one of {', '.join(usages())}")

    def values(self, two: TwoAnswers) -> tuple[float, float]:
        """Return the value of each answer; raise a ValueError if the row lacks a label or a rating."""
        return RANKERS[self.kind].values(two, self.column)

    @property
    def figure(self) -> str:
        """Return the suffix of the figure of `eval` that measures the same property, or ""."""
        return RANKERS[self.kind].figure.format(self.column.removeprefix(SCORE))


def usages() -> list[str]:
    """Return the allowed values of `rank`. Of other packages, return only the names, so that none is imported."""
    built_in = [usage for criterion in RANKERS.built_in.values() for usage in criterion.usage]
    return [*built_in, *(name for name in RANKERS if name not in RANKERS.built_in)]

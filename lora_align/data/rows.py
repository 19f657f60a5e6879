"""The row shapes every source is read into: a comparison of two answers, a rated answer, and a conversation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_align.preference import Ranker


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the answer to learn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Rated:
    """An answer and what raters gave it, by attribute; nan where one was not rated."""

    prompt: tuple[Message, ...]
    answer: str
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """A prompt, the answer to move towards and the one to move away from."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, unranked: `labels` say which was preferred, `ratings` how much each got, or nan."""

    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    labels: Mapping[str, int | None] = field(default_factory=dict)
    ratings: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def ranked(self, ranker: Ranker) -> Pair | str:
        """The pair in this ranker's eyes, or why it sees none."""
        if ranker.kind == "rating" and any(math.isnan(value) for value in self.ratings[ranker.column]):
            return "no rating"
        winner = self._winner(ranker)
        return "tie" if winner is None else Pair(self.prompt, self.answers[winner], self.answers[1 - winner])

    def _winner(self, ranker: Ranker) -> int | None:
        if ranker.kind == "label":
            return self.labels[ranker.column or next(iter(self.labels))]
        rated = ranker.kind == "rating"
        values = self.ratings[ranker.column] if rated else (len(self.answers[0]), len(self.answers[1]))
        if values[0] == values[1]:
            return None
        lowest_wins = ranker.lower or ranker.kind == "shorter"
        return int((values[1] > values[0]) != lowest_wins)

"""The row shapes every source is read into: a comparison of two answers, a rated answer, and a conversation."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from lora_align.rankers import Ranker


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


Prompt = tuple[Message, ...]


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
class Fact:
    """A question, the answer that is right, and others that are wrong."""

    prompt: tuple[Message, ...]
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt, the answer to move towards and the one to move away from."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, unranked: `labels` say which was preferred, `ratings` how much each got, or nan.

    A label is 0, 1, None for a tie, or text where nobody has said which answer it means. `safe` is what somebody said
    of each, if they did.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    labels: Mapping[str, int | str | None] = field(default_factory=dict)
    ratings: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    safe: tuple[bool, bool] | None = None

    def ranked(self, ranker: Ranker, margin: float = 0.0) -> Pair | str:
        """The pair in this ranker's eyes, or why it sees none: with a margin, nearly equal ratings are none."""
        if ranker.kind == "label":
            winner = self.labels[ranker.column or next(iter(self.labels))]
            return self._won_by(winner) if isinstance(winner, int) else "tie"
        rated = ranker.kind == "rating"
        first, second = self.ratings[ranker.column] if rated else map(len, self.answers)
        if math.isnan(first) or math.isnan(second):
            return "no rating"
        if first == second:
            return "tie"
        if abs(first - second) < margin:
            return "too close"
        lowest_wins = ranker.lower or ranker.kind == "shorter"
        return self._won_by(int((second > first) != lowest_wins))

    def _won_by(self, winner: int) -> Pair:
        return Pair(self.prompt, self.answers[winner], self.answers[1 - winner])


def texts(found: Any) -> set[str]:
    """Return every text in a shape, or in a list of them."""
    if isinstance(found, str):
        return {found}
    inside = found if isinstance(found, tuple | list) else vars(found).values() if is_dataclass(found) else ()
    return {text for one in inside for text in texts(one)}


def prompt_key(prompt: Prompt) -> str:
    """Names a prompt by what it says: work is divided, resumed and merged by it."""
    text = json.dumps([(m.role, m.content) for m in prompt], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def under_system(text: str, prompt: Prompt) -> Prompt:
    """The prompt under a system message, put before the one it may have."""
    if not text:
        return prompt
    if prompt and prompt[0].role == "system":
        return (Message("system", f"{text}\n\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", text), *prompt)

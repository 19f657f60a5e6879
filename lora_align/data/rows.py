"""The shapes of rows, as dataclasses: comparisons, pairs, rated answers, conversations, prompts, facts."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from lora_align.rankers import Ranker

Row = Mapping[str, Any]  # a row of a file or of a hub dataset, before it is read into a shape


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns; the last is the answer to train on."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Rated:
    """An answer and its ratings by attribute; nan for a missing rating."""

    prompt: tuple[Message, ...]
    answer: str
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class Fact:
    """A question with its right answer and some wrong answers."""

    prompt: tuple[Message, ...]
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, with labels and ratings by name but not yet ranked.

    A label is the index of the preferred answer, None for a tie, or text if its meaning is unknown. A missing rating is
    nan. `safe` says for each answer whether the data labels it safe.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    labels: Mapping[str, int | str | None] = field(default_factory=dict)
    ratings: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    safe: tuple[bool, bool] | None = None

    def ranked(self, ranker: Ranker, margin: float = 0.0) -> Pair | str:
        """Return the pair as `ranker` orders it, or the reason why there is none: a tie, too close, or no rating."""
        first, second = ranker.values(self)
        if math.isnan(first) or math.isnan(second):
            return "no rating"
        if first == second:
            return "tie"
        if abs(first - second) < margin:
            return "too close"
        winner = int((second > first) != ranker.lower)
        return Pair(self.prompt, self.answers[winner], self.answers[1 - winner])


def texts(shape: Any) -> set[str]:
    """Return every text in a shape, or in a list of shapes."""
    if isinstance(shape, str):
        return {shape}
    parts = shape if isinstance(shape, tuple | list) else vars(shape).values() if is_dataclass(shape) else ()
    return {text for part in parts for text in texts(part)}


def prompt_key(prompt: Prompt) -> str:
    """Return a hash of the prompt. Work is divided, resumed and merged by this hash."""
    text = json.dumps([(m.role, m.content) for m in prompt], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_system_prompt(text: str, prompt: Prompt) -> Prompt:
    """Return the prompt with `text` as its system message. If the prompt has one, put `text` at its beginning."""
    if not text:
        return prompt
    if prompt and prompt[0].role == "system":
        return (Message("system", f"{text}\n\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", text), *prompt)


def without_system_prompt(text: str, prompt: Prompt) -> Prompt:
    """Return the prompt from which `with_system_prompt` made this one."""
    if not text:
        return prompt
    rest = prompt[0].content.removeprefix(text).removeprefix("\n\n")
    return (Message("system", rest), *prompt[1:]) if rest else prompt[1:]

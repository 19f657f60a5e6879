"""Rows as token ids, cut to a length; what does not fit is counted by its reason."""

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align.data.rows import Conversation, Pair, Rated
from lora_align.model.chat_format import ChatFormat
from lora_align.preference import Direction

IGNORED = -100  # a label that no loss looks at


@dataclass(frozen=True)
class TokenPair:
    """A pair as the model sees it; `reference` is log π of chosen and rejected under the start policy, once known."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float] = (math.nan, math.nan)

    def shared(self) -> tuple[list[int], list[list[int]]]:
        """The prompt, and both answers to it."""
        return self.prompt, [self.chosen, self.rejected]

    def swap(self) -> "TokenPair":
        """The same pair with its labels switched."""
        return TokenPair(self.prompt, self.rejected, self.chosen, self.reference[::-1])

    def facing(self, direction: Direction) -> "TokenPair":
        """As this direction trains on it: `neg` is the swap, and nothing else."""
        return self.swap() if direction is Direction.neg else self


@dataclass(frozen=True)
class TokenRated:
    """A rated answer as the model sees it."""

    prompt: list[int]
    answer: list[int]
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class TokenText:
    """A conversation as the model sees it, and which tokens it is to learn."""

    ids: list[int]
    labels: list[int]


def pair(row: Pair, chat: ChatFormat, max_length: int, counts: Counter[str]) -> TokenPair | None:
    """Both answers behind their prompt, each cut at `max_length`; None where cutting leaves nothing to learn."""
    prompt = chat.prompt_ids(row.prompt)
    room = max_length - len(prompt)
    answers = [chat.answer_ids(row.prompt, answer) for answer in (row.chosen, row.rejected)]
    if room < 1:
        counts["prompt too long"] += 1
        return None
    chosen, rejected = (ids[:room] for ids in answers)
    if chosen == rejected:
        counts["alike once cut"] += 1
        return None
    counts["answers cut"] += sum(len(ids) > room for ids in answers)
    return TokenPair(prompt, chosen, rejected)


def rated(row: Rated, chat: ChatFormat, max_length: int, counts: Counter[str]) -> TokenRated | None:
    """An answer behind its prompt, cut at `max_length`; None where the prompt leaves no room for it."""
    prompt = chat.prompt_ids(row.prompt)
    answer = chat.answer_ids(row.prompt, row.answer)
    room = max_length - len(prompt)
    if room < 1:
        counts["prompt too long"] += 1
        return None
    counts["answers cut"] += len(answer) > room
    return TokenRated(prompt, answer[:room], row.ratings)


def text(
    row: Conversation, chat: ChatFormat, max_length: int, answers_only: bool, counts: Counter[str]
) -> TokenText | None:
    """A whole conversation; with `answers_only` the loss sees what the assistant says and nothing else."""
    *before, last = row.messages
    prompt = chat.prompt_ids(before)
    if len(prompt) >= max_length:
        counts["prompt too long"] += 1
        return None
    ids = prompt + chat.answer_ids(before, last.content)
    labels = list(ids)
    if answers_only:
        labels[: len(prompt)] = _earlier_answers(row, chat, prompt)
    counts["answers cut"] += len(ids) > max_length
    return TokenText(ids[:max_length], labels[:max_length])


def pack(rows: Sequence[TokenText], length: int) -> list[list[TokenText]]:
    """Rows side by side in as few packs of at most this many tokens as best fit finds, the longest first."""
    packs: list[list[TokenText]] = []
    room: list[tuple[int, int]] = []  # what is left in each pack, and which it is, least first
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        at = bisect.bisect_left(room, (len(row.ids), -1))
        if at < len(room):
            left, number = room.pop(at)
            packs[number].append(row)
        else:
            left, number = max(length, len(row.ids)), len(packs)
            packs.append([row])
        bisect.insort(room, (left - len(row.ids), number))
    return packs


def _earlier_answers(row: Conversation, chat: ChatFormat, prompt: Sequence[int]) -> list[int]:
    """Labels for a prompt: the assistant's earlier answers, where the template shows them as they were said."""
    labels = [IGNORED] * len(prompt)
    for turn, message in enumerate(row.messages[:-1]):
        if message.role == "assistant":
            start = chat.prompt_ids(row.messages[:turn])
            said = chat.answer_ids(row.messages[:turn], message.content)
            end = len(start) + len(said)
            if list(prompt[:end]) == start + said:
                labels[len(start) : end] = said
    return labels

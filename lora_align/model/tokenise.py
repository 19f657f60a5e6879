"""Rows as token ids, cut to a length; what does not fit is counted by its reason."""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_align.data.rows import Conversation, Message, Pair, Rated
from lora_align.model.chat_format import ChatFormat
from lora_align.rankers import Direction

IGNORED = -100  # a label that no loss looks at
Said = tuple[Sequence[Message], Sequence[str]]  # a conversation, and answers to it
CUT = "answers cut"  # what is counted without being dropped


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


def pairs(rows: Sequence[Pair], chat: ChatFormat, max_length: int, counts: Counter[str]) -> list[TokenPair | None]:
    """Both answers behind their prompt, each cut at `max_length`; None where cutting leaves nothing to learn."""
    asked = short(((row.prompt, (row.chosen, row.rejected)) for row in rows), chat, max_length)
    return [pair(prompt, answers, max_length, counts) for prompt, answers in chat.answered_each(asked)]


def pair(prompt: list[int], answers: Sequence[list[int]], max_length: int, counts: Counter[str]) -> TokenPair | None:
    """Cut two answers at `max_length`; None where nothing is left to learn, which is counted."""
    room = max_length - len(prompt)
    chosen, rejected = (ids[: max(room, 0)] for ids in answers)
    if room < 1:
        counts["prompt too long"] += 1
    elif answers[0] == answers[1]:
        counts["alike in the chat template"] += 1
    elif chosen == rejected:
        counts["alike once cut"] += 1
    else:
        counts[CUT] += sum(len(ids) > room for ids in answers)
        return TokenPair(prompt, chosen, rejected)
    return None


def rated(rows: Sequence[Rated], chat: ChatFormat, max_length: int, counts: Counter[str]) -> list[TokenRated | None]:
    """Answers behind their prompts, cut at `max_length`; None where the prompt leaves no room."""
    found: list[TokenRated | None] = []
    tokens = chat.answered_each(short(((row.prompt, (row.answer,)) for row in rows), chat, max_length))
    for row, (prompt, [answer]) in zip(rows, tokens, strict=True):
        room = max_length - len(prompt)
        if room < 1:
            counts["prompt too long"] += 1
            found.append(None)
        else:
            counts[CUT] += len(answer) > room
            found.append(TokenRated(prompt, answer[:room], row.ratings))
    return found


def texts(
    rows: Sequence[Conversation], chat: ChatFormat, max_length: int, counts: Counter[str], *, answers_only: bool
) -> list[TokenText | None]:
    """Whole conversations; with `answers_only` the loss sees what the assistant says and nothing else."""
    found: list[TokenText | None] = []
    said = ((row.messages[:-1], (row.messages[-1].content,)) for row in rows)
    tokens = chat.answered_each(short(said, chat, max_length))
    for row, (prompt, [answer]) in zip(rows, tokens, strict=True):
        if len(prompt) >= max_length:
            counts["prompt too long"] += 1
            found.append(None)
            continue
        ids = prompt + answer
        labels = list(ids)
        if answers_only:
            labels[: len(prompt)] = _earlier_answers(row, chat, prompt)
        counts[CUT] += len(ids) > max_length
        found.append(TokenText(ids[:max_length], labels[:max_length]))
    return found


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which rows stand side by side, in as few packs of at most this many tokens as best fit finds, longest first."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each pack, and which it is, least first
    for row, length in sorted(enumerate(lengths), key=lambda of: -of[1]):
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, number = room.pop(at)
            packs[number].append(row)
        else:
            left, number = max(width, length), len(packs)
            packs.append([row])
        bisect.insort(room, (left - length, number))
    return packs


def short(asked: Iterable[Said], chat: ChatFormat, max_length: int) -> list[Said]:
    """Of each text as much as is certainly too long: of megabytes, tokenizers would make gigabytes."""
    most = (max_length + 1) * chat.longest_token
    return [
        (
            tuple(replace(message, content=message.content[:most]) for message in prompt),
            tuple(answer[:most] for answer in answers),
        )
        if max(map(len, (*(message.content for message in prompt), *answers))) > most
        else (prompt, answers)
        for prompt, answers in asked
    ]


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

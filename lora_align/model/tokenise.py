"""Tokenisation of many rows for training, truncated to a maximum length.

Rows that are dropped are counted by reason.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_align.data.rows import Conversation, Message, Pair, Rated
from lora_align.model.chat_format import ChatFormat
from lora_align.rankers import Direction

IGNORED = -100  # the label of a token that the loss ignores
MessagesWithAnswers = tuple[Sequence[Message], Sequence[str]]
TRUNCATED = "answers truncated"  # counts truncated answers, which are not dropped


@dataclass(frozen=True)
class TokenPair:
    """A tokenised pair. `reference` holds log π of chosen and rejected under the start policy, NaN until computed."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float] = (math.nan, math.nan)

    def shared(self) -> tuple[list[int], list[list[int]]]:
        """Return the prompt and both answers to it."""
        return self.prompt, [self.chosen, self.rejected]

    def swap(self) -> "TokenPair":
        """Return the pair with chosen and rejected switched."""
        return TokenPair(self.prompt, self.rejected, self.chosen, self.reference[::-1])

    def for_direction(self, direction: Direction) -> "TokenPair":
        """Return the pair that this direction trains on: swapped for `neg`, unchanged for `pos`."""
        return self.swap() if direction is Direction.neg else self


@dataclass(frozen=True)
class TokenRated:
    """A tokenised answer and its ratings."""

    prompt: list[int]
    answer: list[int]
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class TokenText:
    """A tokenised conversation. `labels` is IGNORED where the loss ignores a token."""

    ids: list[int]
    labels: list[int]


def pairs(rows: Sequence[Pair], chat: ChatFormat, max_length: int, counts: Counter[str]) -> list[TokenPair | None]:
    """Tokenise pairs and truncate each answer at `max_length`. The result has None for a dropped pair."""
    shortened = truncate_texts(((row.prompt, (row.chosen, row.rejected)) for row in rows), chat, max_length)
    return [pair(prompt, answers, max_length, counts) for prompt, answers in chat.answered_each(shortened)]


def pair(prompt: list[int], answers: Sequence[list[int]], max_length: int, counts: Counter[str]) -> TokenPair | None:
    """Truncate two answers at `max_length`. Return None, and count the reason, for a pair that is dropped."""
    limit = max_length - len(prompt)
    chosen, rejected = (ids[: max(limit, 0)] for ids in answers)
    if limit < 1:
        counts["prompt too long"] += 1
    elif answers[0] == answers[1]:
        counts["equal in the chat template"] += 1
    elif chosen == rejected:
        counts["equal after truncation"] += 1
    else:
        counts[TRUNCATED] += sum(len(ids) > limit for ids in answers)
        return TokenPair(prompt, chosen, rejected)
    return None


def rated(rows: Sequence[Rated], chat: ChatFormat, max_length: int, counts: Counter[str]) -> list[TokenRated | None]:
    """Tokenise rated answers and truncate them at `max_length`. The result has None if the prompt fills it."""
    tokenised: list[TokenRated | None] = []
    tokens = chat.answered_each(truncate_texts(((row.prompt, (row.answer,)) for row in rows), chat, max_length))
    for row, (prompt, [answer]) in zip(rows, tokens, strict=True):
        limit = max_length - len(prompt)
        if limit < 1:
            counts["prompt too long"] += 1
            tokenised.append(None)
        else:
            counts[TRUNCATED] += len(answer) > limit
            tokenised.append(TokenRated(prompt, answer[:limit], row.ratings))
    return tokenised


def texts(
    rows: Sequence[Conversation], chat: ChatFormat, max_length: int, counts: Counter[str], *, answers_only: bool
) -> list[TokenText | None]:
    """Tokenise conversations and truncate them at `max_length`. With `answers_only` only assistant tokens are labelled.

    The result has None for a conversation whose earlier messages fill max_length.
    """
    tokenised: list[TokenText | None] = []
    split = ((row.messages[:-1], (row.messages[-1].content,)) for row in rows)
    tokens = chat.answered_each(truncate_texts(split, chat, max_length))
    for row, (prompt, [answer]) in zip(rows, tokens, strict=True):
        if len(prompt) >= max_length:
            counts["prompt too long"] += 1
            tokenised.append(None)
            continue
        ids = prompt + answer
        labels = list(ids)
        if answers_only:
            labels[: len(prompt)] = _earlier_answers(row, chat, prompt)
        counts[TRUNCATED] += len(ids) > max_length
        tokenised.append(TokenText(ids[:max_length], labels[:max_length]))
    return tokenised


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack rows into packs of at most `width` tokens by best-fit decreasing. Return the row indices of each pack."""
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (free tokens, pack index), sorted
    for row, length in sorted(enumerate(lengths), key=lambda of: -of[1]):
        at = bisect.bisect_left(open_packs, (length, -1))
        if at < len(open_packs):
            left, number = open_packs.pop(at)
            packs[number].append(row)
        else:
            left, number = max(width, length), len(packs)
            packs.append([row])
        bisect.insort(open_packs, (left - length, number))
    return packs


def truncate_texts(rows: Iterable[MessagesWithAnswers], chat: ChatFormat, max_length: int) -> list[MessagesWithAnswers]:
    """Truncate each text to a length that surely exceeds `max_length`, so that huge rows do not exhaust memory."""
    most = (max_length + 1) * chat.longest_token
    return [
        (
            tuple(replace(message, content=message.content[:most]) for message in prompt),
            tuple(answer[:most] for answer in answers),
        )
        if max(map(len, (*(message.content for message in prompt), *answers))) > most
        else (prompt, answers)
        for prompt, answers in rows
    ]


def _earlier_answers(row: Conversation, chat: ChatFormat, prompt: Sequence[int]) -> list[int]:
    """Return labels for a prompt. Label only the assistant's earlier answers that the template renders unchanged."""
    labels = [IGNORED] * len(prompt)
    for turn, message in enumerate(row.messages[:-1]):
        if message.role == "assistant":
            start = chat.prompt_ids(row.messages[:turn])
            answer = chat.answer_ids(row.messages[:turn], message.content)
            end = len(start) + len(answer)
            if list(prompt[:end]) == start + answer:
                labels[len(start) : end] = answer
    return labels

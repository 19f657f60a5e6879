"""From a preference to pairs, and from an [sft] table to conversations: rank, drop with a reason, split by prompt."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from lora_align.data import forms, sources
from lora_align.data.rows import Comparison, Conversation, Message, Pair
from lora_align.errors import UserError
from lora_align.preference import Preference, Ranker
from lora_align.recipe import Sft

T = TypeVar("T")
Split = Iterator[tuple[T, bool]]  # each row, and whether it is held out


def read_pairs(preference: Preference, held_out: float, limit: int | None, dropped: Counter[str]) -> Split[Pair]:
    """A preference's comparisons, ranked; at most `limit` pairs to train on."""
    rows = sources.read(preference, forms.comparisons, dropped)
    left = limit or -1
    for _, pair in (ranked(one, preference, where) for where, several in rows for one in several):
        if isinstance(pair, str):
            dropped[pair] += 1
        else:
            aside = is_held_out(pair.prompt, held_out)
            yield pair, aside
            left -= not aside
        if not left:
            break


def ranked(comparison: Comparison, preference: Preference, where: str) -> tuple[Comparison, Pair | str]:
    """A comparison, and the pair in a preference's eyes, or why there is none to learn from."""
    if missing := _missing(comparison, preference.ranker):
        if not preference.skip_bad:
            raise UserError(f"{where}: {missing}")
        return comparison, sources.INVALID
    found = comparison.ranked(preference.ranker, preference.margin)
    return comparison, found if isinstance(found, str) else _usable(found)


def read_conversations(sft: Sft, dropped: Counter[str]) -> Split[Conversation]:
    """The conversations an [sft] table names; at most its `limit` to train on."""
    left = sft.limit or -1
    for _, found in sources.read(sft, forms.conversation, dropped):
        if not found.messages[-1].content.strip():
            dropped["empty answer"] += 1
        else:
            aside = is_held_out(found.messages[:-1], sft.held_out)
            yield found, aside
            left -= not aside
        if not left:
            break


def is_held_out(prompt: tuple[Message, ...], share: float) -> bool:
    """Decided by the prompt alone, so that a prompt never stands on both sides."""
    text = json.dumps([(m.role, " ".join(m.content.split())) for m in prompt])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 < share


def reasons(dropped: Counter[str]) -> str:
    """`3 tie, 1 empty answer`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())


def _missing(comparison: Comparison, ranker: Ranker) -> str:
    """What a ranker needs and is not there."""
    names = {"label": comparison.labels, "rating": comparison.ratings}.get(ranker.kind)
    if names is None or ranker.column in names or (names and not ranker.column):
        return ""
    return f"no {ranker.kind} {ranker.column!r} in this row (it has: {', '.join(names) or 'none'})"


def _usable(pair: Pair) -> Pair | str:
    """The pair, or why nothing can be learned from it."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    return "equal answers" if pair.chosen == pair.rejected else pair

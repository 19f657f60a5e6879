"""From a preference to pairs, and from an [sft] table to conversations: rank, drop with a reason, split by prompt."""

import hashlib
import json
import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from lora_align.data import forms, sources
from lora_align.data.labels import labels_of
from lora_align.data.rows import Comparison, Conversation, Pair, Prompt
from lora_align.errors import UserError
from lora_align.rankers import Ranker
from lora_align.recipe import Preference, Sft

ENOUGH = 20  # held-out pairs below which an accuracy says nothing
FIFTHS = 5  # the share of its prompts that a small source holds out at most: one of so many
T = TypeVar("T")
Split = Iterator[tuple[T, bool]]  # each row, and whether it is held out


class Judged(NamedTuple):
    """A comparison and where it stands; the pair a preference makes of it, or why none; whether it is held out."""

    where: str
    comparison: Comparison
    pair: Pair | str
    aside: bool


def compared(preference: Preference, held_out: float, limit: int | None, dropped: Counter[str]) -> Iterator[Judged]:
    """Rank a preference's comparisons, up to `limit` pairs to train on; those that make no pair are counted."""
    if labels := labels_of(preference):
        preference = replace(preference, rank=f"label:{labels.column}")
    below = split_at((one.prompt for _, some in sources.sound(preference, forms.comparisons) for one in some), held_out)
    left = limit or -1
    decoded = labels.decoded if labels else sources.unchanged
    for where, several in sources.read(preference, forms.comparisons, dropped, decoded):
        for one in several:
            comparison, pair = ranked(one, preference, where)
            aside = is_held_out(comparison.prompt, below)
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                left -= not aside
            yield Judged(where, comparison, pair, aside)
            if not left:
                return


def read_pairs(preference: Preference, held_out: float, limit: int | None, dropped: Counter[str]) -> Split[Pair]:
    """Yield a preference's pairs, at most `limit` to train on."""
    for one in compared(preference, held_out, limit, dropped):
        if not isinstance(one.pair, str):
            yield one.pair, one.aside


def ranked(comparison: Comparison, preference: Preference, where: str) -> tuple[Comparison, Pair | str]:
    """A comparison, and the pair in a preference's eyes, or why there is none to learn from."""
    ranker = preference.ranker
    if missing := _missing(comparison, ranker):
        if not preference.skip_bad:
            raise UserError(f"{where}: {missing}")
        return comparison, sources.INVALID
    if ranker.kind == "label":  # of a row that is unlike the ones that were looked at before
        names = [ranker.column] if ranker.column else list(comparison.labels)
        if len(names) > 1:
            raise UserError(f'{where}: several label columns ({", ".join(names)}); rank = "label:COLUMN" names one')
        if isinstance(value := comparison.labels[names[0]], str):
            raise UserError(f"{where}: {names[0]} is {value}; `labels` says which answer each value prefers")
    found = comparison.ranked(ranker, preference.margin)
    return comparison, found if isinstance(found, str) else _usable(found)


def read_conversations(sft: Sft, dropped: Counter[str]) -> Split[Conversation]:
    """The conversations an [sft] table names; at most its `limit` to train on."""
    left = sft.limit or -1
    below = split_at((found.messages[:-1] for _, found in sources.sound(sft, forms.conversation)), sft.held_out)
    for _, found in sources.read(sft, forms.conversation, dropped):
        if not found.messages[-1].content.strip():
            dropped["empty answer"] += 1
        else:
            aside = is_held_out(found.messages[:-1], below)
            yield found, aside
            left -= not aside
        if not left:
            break


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Decided by the prompt alone, so that a prompt never stands on both sides."""
    return _place(prompt) < share


def split_at(prompts: Iterable[Prompt], share: float) -> float:
    """Return the share of prompts that a source holds out: the one asked for, or more where it is small.

    Of a source in which less than ENOUGH rows would be held out, as many prompts are, though at most a fifth of them.
    All of a source's prompts decide that, ranked or not and whatever the limit: so all preferences and directions on it
    hold out the same ones. Only as many rows are looked at as it takes to see that there are enough.
    """
    if not share:
        return share
    rows, known, lowest = 0, set[float](), list[float]()
    for prompt in prompts:
        place = _place(prompt)
        rows += place < share
        if rows >= ENOUGH:
            return share
        if place not in lowest:
            insort(lowest, place)
            del lowest[ENOUGH:]
        if len(known) < FIFTHS * ENOUGH:
            known.add(place)
    wanted = min(ENOUGH, len(known) // FIFTHS)
    return max(share, math.nextafter(lowest[wanted - 1], 1)) if wanted else share


def _place(prompt: Prompt) -> float:
    """From 0 to 1, by the text of a prompt."""
    text = json.dumps([(m.role, " ".join(m.content.split())) for m in prompt])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def reasons(dropped: Counter[str]) -> str:
    """`3 tie, 1 empty answer`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())


def _missing(comparison: Comparison, ranker: Ranker) -> str:
    """What a ranker needs and is not there."""
    names = {"label": comparison.labels, "rating": comparison.ratings}.get(ranker.kind)
    if names is None or ranker.column in names or (names and not ranker.column):
        return ""
    which = f"no {ranker.kind} {ranker.column!r}" if ranker.column else f"no {ranker.kind} column"
    return f"{which} in this row (it has: {', '.join(names) or 'none'})"


def _usable(pair: Pair) -> Pair | str:
    """The pair, or why nothing can be learned from it."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    return "equal answers" if pair.chosen == pair.rejected else pair

"""Pairs of a preference and conversations of [sft]: rank, drop with a reason, split by prompt."""

import hashlib
import json
import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from lora_align.data import row_reader, sources
from lora_align.data.labels import labels_of
from lora_align.data.rows import Comparison, Conversation, Pair, Prompt
from lora_align.errors import UserError
from lora_align.recipe import Preference, Sft

MIN_HELD_OUT = 20  # fewest held-out pairs for a meaningful accuracy
READ_HELD_OUT = 2 * MIN_HELD_OUT  # held-out rows to read; tokenisation drops some of them as too long
TOO_FEW_ANSWERS = "fewer than two answers"  # a reason to drop a row
ONE_IN = 5  # a small source holds out at most one prompt in five
T = TypeVar("T")
Split = Iterator[tuple[T, bool]]  # (row, whether it is held out)


class RankedComparison(NamedTuple):
    """A ranked comparison."""

    where: str
    comparison: Comparison
    pair: Pair | str  # the pair, or the reason why there is none
    held_out: bool


class Quota:
    """Count the rows of a source: `limit` training rows are read, and reading goes on until READ_HELD_OUT are held out.

    Without a limit, every row is wanted.
    """

    def __init__(self, limit: int | None, held_out: float) -> None:
        self.training = limit or math.inf
        self.aside = READ_HELD_OUT if held_out else 0
        self.counted = 0

    @property
    def full(self) -> bool:
        """Return whether no further row is wanted."""
        return self.training <= 0 and self.aside <= 0

    def wants(self, aside: bool) -> bool:
        """Return whether another training row, or with `aside` another held-out row, is wanted."""
        return self.training > 0 or (aside and self.aside > 0)

    def count(self, aside: bool) -> None:
        self.counted += 1
        if aside:
            self.aside -= 1
        else:
            self.training -= 1


def rank_comparisons(
    preference: Preference, held_out: float, limit: int | None, dropped: Counter[str]
) -> Iterator[RankedComparison]:
    """Rank a preference's comparisons within a Quota of pairs; count those without a pair in `dropped`."""
    if labels := labels_of(preference):
        preference = replace(preference, rank=f"label:{labels.column}")
    below = held_out_threshold(
        (one.prompt for _, some in sources.readable_rows(preference, row_reader.comparisons) for one in some), held_out
    )
    quota = Quota(limit, held_out)
    decode = labels.decode if labels else sources.unchanged
    for where, several in sources.read(preference, row_reader.comparisons, dropped, decode):
        if not several:
            dropped[TOO_FEW_ANSWERS] += 1
        for one in several:
            aside = is_held_out(one.prompt, below)
            if not quota.wants(aside):
                continue
            pair = rank_comparison(one, preference, where)
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                quota.count(aside)
            yield RankedComparison(where, one, pair, aside)
        if quota.full:
            return


def read_pairs(preference: Preference, held_out: float, limit: int | None, dropped: Counter[str]) -> Split[Pair]:
    """Yield a preference's pairs within a Quota."""
    for one in rank_comparisons(preference, held_out, limit, dropped):
        if not isinstance(one.pair, str):
            yield one.pair, one.held_out


def rank_comparison(comparison: Comparison, preference: Preference, where: str) -> Pair | str:
    """Return a comparison's pair under a preference, or the reason why there is none."""
    ranker = preference.ranker
    try:
        pair = comparison.ranked(ranker, preference.margin)
    except ValueError as fault:
        if not preference.skip_bad:
            raise UserError(f"{where}: {fault}{sources.SKIP}") from fault
        return sources.INVALID
    if ranker.kind == "label":  # a row of another form may have label columns that `labels_of` did not read
        names = [ranker.column] if ranker.column else list(comparison.labels)
        if len(names) > 1:
            raise UserError(f'{where}: several label columns ({", ".join(names)}); set rank = "label:COLUMN"')
        if isinstance(value := comparison.labels[names[0]], str):
            raise UserError(f"{where}: {names[0]} is {value!r}, whose meaning is unknown; set it in `labels`")
    return pair if isinstance(pair, str) else _usable(pair)


def read_conversations(sft: Sft, dropped: Counter[str]) -> Split[Conversation]:
    """Yield the conversations of an [sft] table within a Quota."""
    quota = Quota(sft.limit, sft.held_out)
    below = held_out_threshold(
        (one.messages[:-1] for _, one in sources.readable_rows(sft, row_reader.conversation)), sft.held_out
    )
    for _, conversation in sources.read(sft, row_reader.conversation, dropped):
        aside = is_held_out(conversation.messages[:-1], below)
        if not quota.wants(aside):
            continue
        if not conversation.messages[-1].content.strip():
            dropped["empty answer"] += 1
        else:
            quota.count(aside)
            yield conversation, aside
        if quota.full:
            break


def is_held_out(prompt: Prompt, below: float) -> bool:
    """Return whether a prompt is held out: its hash is below the threshold `below`.

    A hash of the text decides, so no prompt is on both sides of the split.
    """
    return _hash(prompt) < below


def held_out_threshold(prompts: Iterable[Prompt], share: float) -> float:
    """Return the hash below which a source's prompts are held out: `share`, or more for a small source.

    If `share` holds out fewer than MIN_HELD_OUT rows, MIN_HELD_OUT prompts are held out, but at most a fifth of all
    prompts. `prompts` are all prompts of the source, without ranking or limit, so that all preferences and directions
    hold out the same prompts. Reading stops once MIN_HELD_OUT rows are found.
    """
    if not share:
        return share
    rows, known, lowest = 0, set[float](), list[float]()
    for prompt in prompts:
        value = _hash(prompt)
        rows += value < share
        if rows >= MIN_HELD_OUT:
            return share
        if value not in lowest:
            insort(lowest, value)
            del lowest[MIN_HELD_OUT:]
        if len(known) < ONE_IN * MIN_HELD_OUT:
            known.add(value)
    wanted = min(MIN_HELD_OUT, len(known) // ONE_IN)
    return max(share, math.nextafter(lowest[wanted - 1], 1)) if wanted else share


def _hash(prompt: Prompt) -> float:
    """Return a hash of the prompt's text from 0 to 1."""
    text = json.dumps([(m.role, " ".join(m.content.split())) for m in prompt])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def reasons(dropped: Counter[str]) -> str:
    """Return the reasons with their counts, such as `3 × tie, 1 × empty answer`."""
    return ", ".join(f"{count:,} × {reason}" for reason, count in dropped.most_common())


def _usable(pair: Pair) -> Pair | str:
    """Return the pair, or the reason why it cannot be trained on."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    return "equal answers" if pair.chosen == pair.rejected else pair

"""Counts for the command `data`, over the ranked comparisons of a preference."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_align.data import pairs, sources
from lora_align.data.pairs import RankedComparison
from lora_align.data.rows import Pair
from lora_align.errors import UserError
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.recipe import Preference

SIDES = ("prompt", "chosen", "rejected")
WORD = re.compile(r"\w+")


@dataclass
class AuditCounts:
    """Counts over ranked comparisons, added one by one. Rows are not stored, only their lengths and hashes.

    The keys of `made`, `usable` and `prompts` are True for held-out pairs, and False for training pairs.
    """

    base: Base
    max_length: int
    others: Mapping[str, Preference]  # other preferences on the same source, to compare with
    incomparable: dict[str, str]  # preference → why it cannot be compared
    rows: int = 0
    last_row: str = ""
    invalid: int = 0  # comparisons that the ranker cannot rank
    dropped: Counter[str] = field(default_factory=Counter)
    made: Counter[bool] = field(default_factory=Counter)
    usable: Counter[bool] = field(default_factory=Counter)
    prompts: dict[bool, set[bytes]] = field(default_factory=lambda: {True: set(), False: set()})
    lengths: "dict[str, array[int]]" = field(default_factory=lambda: {side: array("I") for side in SIDES})
    prompts_too_long: int = 0
    answers_truncated: int = 0
    equal_once_truncated: int = 0
    longer_wins: int = 0
    unequal_lengths: int = 0
    both_unsafe: int = 0
    known_safety: int = 0
    seen: set[bytes] = field(default_factory=set)
    repeated: int = 0
    contradicted: int = 0
    same: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)

    def add(self, ranked: RankedComparison) -> None:
        """Count a comparison, and its pair if it has one."""
        self.rows += ranked.where != self.last_row  # a row of more than two answers makes several comparisons
        self.last_row = ranked.where
        pair = ranked.pair
        if isinstance(pair, str):
            self.invalid += pair == sources.INVALID
            return
        self.made[ranked.held_out] += 1
        if not self._fits(pair):
            return
        self.usable[ranked.held_out] += 1
        self.prompts[ranked.held_out].add(_digest([WORD.findall(turn.content.casefold()) for turn in pair.prompt]))
        if (safe := ranked.comparison.safe) is not None:
            self.known_safety += 1
            self.both_unsafe += not any(safe)
        self.unequal_lengths += len(pair.chosen) != len(pair.rejected)
        self.longer_wins += len(pair.chosen) > len(pair.rejected)
        self._compare(ranked, pair)
        digest = _digest([pair.prompt, pair.chosen, pair.rejected])
        self.repeated += digest in self.seen
        self.contradicted += _digest([pair.prompt, pair.rejected, pair.chosen]) in self.seen
        self.seen.add(digest)

    def _fits(self, pair: Pair) -> bool:
        """Measure a pair in tokens; return whether `dpo` would use it."""
        chat = self.base.chat
        [texts] = tokenise.truncate_texts([(pair.prompt, (pair.chosen, pair.rejected))], chat, self.max_length)
        prompt, answers = chat.answered(*texts)
        space, (chosen, rejected) = self.max_length - len(prompt), answers
        self.prompts_too_long += space < 1
        self.answers_truncated += sum(0 < space < len(answer) for answer in answers)
        self.equal_once_truncated += space > 0 and chosen != rejected and chosen[:space] == rejected[:space]
        if tokenise.pair(prompt, answers, self.max_length, self.dropped) is None:
            return False
        for side, ids in zip(SIDES, (prompt, *answers), strict=True):
            self.lengths[side].append(len(ids))
        return True

    def _compare(self, ranked: RankedComparison, pair: Pair) -> None:
        """Count which other preferences choose the same answer; stop comparing one that cannot rank these rows."""
        for name, other in self.others.items():
            if name in self.incomparable:
                continue
            try:
                theirs = pairs.rank_comparison(ranked.comparison, other, ranked.where)
            except UserError as fault:  # `data` and `dpo` refuse this row for that preference only
                self.incomparable[name] = str(fault)
                del self.compared[name]
                continue
            if not isinstance(theirs, str):
                self.compared[name] += 1
                self.same[name] += theirs.chosen == pair.chosen


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, default=vars).encode()).digest()[:8]

"""From a preference to pairs: rank, drop with a reason, split by prompt, and fingerprint."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from lora_align.data import forms, sources
from lora_align.data.rows import Comparison, Conversation, Message, Pair, Rated
from lora_align.errors import UserError
from lora_align.preference import Preference, Ranker
from lora_align.recipe import Sft

T = TypeVar("T", Pair, Conversation, Rated)


@dataclass(frozen=True)
class Split(Generic[T]):
    """Rows to train on, rows held out by their prompt, and how many were dropped for what reason."""

    train: list[T]
    held_out: list[T]
    dropped: Counter[str]

    def fingerprint(self) -> str:
        """Names exactly these rows in this order."""
        digest = hashlib.sha256()
        for row in chain(self.train, [None], self.held_out):
            digest.update(json.dumps(asdict(row) if row else None).encode())
        return digest.hexdigest()

    def require_rows(self, what: str) -> None:
        """Refuse to train on nothing."""
        if not self.train:
            held_out = f"all {len(self.held_out)} held out; lower held_out" if self.held_out else ""
            why = ", ".join(filter(None, (held_out, reasons(self.dropped)))) or "the source is empty"
            raise UserError(f"{what}: no rows left ({why})")


def load_pairs(preference: Preference, held_out: float, limit: int | None = None) -> Split[Pair]:
    """Read a preference's comparisons and rank them; at most `limit` pairs to train on."""
    split: Split[Pair] = Split([], [], Counter())
    rows = sources.read(preference, forms.comparisons, split.dropped)
    for _, pair in (ranked(one, preference, where) for where, several in rows for one in several):
        if isinstance(pair, str):
            split.dropped[pair] += 1
        else:
            (split.held_out if is_held_out(pair.prompt, held_out) else split.train).append(pair)
        if limit and len(split.train) == limit:
            break
    split.require_rows(preference.data)
    return split


def ranked(comparison: Comparison, preference: Preference, where: str) -> tuple[Comparison, Pair | str]:
    """A comparison, and the pair in a preference's eyes, or why there is none to learn from."""
    _check_ranker(comparison, preference.ranker, where)
    found = comparison.ranked(preference.ranker, preference.margin)
    return comparison, found if isinstance(found, str) else _usable(found)


def load_conversations(sft: Sft) -> Split[Conversation]:
    """Read the conversations an [sft] table names; at most its `limit` to train on."""
    split: Split[Conversation] = Split([], [], Counter())
    for _, found in sources.read(sft, forms.conversation, split.dropped):
        if not found.messages[-1].content.strip():
            split.dropped["empty answer"] += 1
        else:
            (split.held_out if is_held_out(found.messages[:-1], sft.held_out) else split.train).append(found)
        if sft.limit and len(split.train) == sft.limit:
            break
    split.require_rows(sft.data)
    return split


def facts(
    source: Any, split: Split[Any], train: int, held_out: int, counts: Counter[str], max_length: int
) -> dict[str, Any]:
    """What a manifest says of the rows that were left after tokenising; an error where none were."""
    cut = counts.pop("answers cut", 0)
    dropped = split.dropped + counts
    if not train:
        raise UserError(f"{source}: no rows left ({reasons(dropped)}); max_length is {max_length}")
    return {
        "source": source,
        "fingerprint": split.fingerprint(),
        "rows": train,
        "held_out": held_out,
        "dropped": dict(dropped),
        "answers_cut": cut,
        "max_length": max_length,
    }


def is_held_out(prompt: tuple[Message, ...], share: float) -> bool:
    """Decided by the prompt alone, so that a prompt never stands on both sides."""
    text = json.dumps([(m.role, " ".join(m.content.split())) for m in prompt])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 < share


def reasons(dropped: Counter[str]) -> str:
    """`3 tie, 1 empty answer`."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())


def _check_ranker(comparison: Comparison, ranker: Ranker, where: str) -> None:
    if ranker.kind not in ("label", "rating"):
        return
    names = list(comparison.labels if ranker.kind == "label" else comparison.ratings)
    if ranker.column not in names and (ranker.column or not names):
        raise UserError(
            f"{where}: no {ranker.kind} {ranker.column!r} in this row (it has: {', '.join(names) or 'none'})"
        )


def _usable(pair: Pair) -> Pair | str:
    """The pair, or why nothing can be learned from it."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    return "equal answers" if pair.chosen == pair.rejected else pair

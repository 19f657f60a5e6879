"""What a preference's data is: rows as the model will see them, how long they are, and what is odd about them."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_align.console import count, table
from lora_align.data import pairs, sources
from lora_align.data.labels import labels_of
from lora_align.data.rows import Comparison, Pair
from lora_align.errors import UserError
from lora_align.metrics.histogram import bars, histogram
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.chat_format import text_of
from lora_align.model.tokenise import TRUNCATED
from lora_align.recipe import Dpo, Preference, Recipe
from lora_align.train import lora_trainer
from lora_align.train.token_rows import no_rows_left

SIDES = ("prompt", "chosen", "rejected")
SHARES = (0.0, 0.5, 0.95, 1.0)  # of the lengths that a table tells
WORD = re.compile(r"\w+")
TOO_BIASED = 0.65  # how often one length may win before that is named


@dataclass
class Audit:
    """Counts over the comparisons of one preference; rows go by, and are not kept."""

    rows: int = 0
    made: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # pairs, held out or not
    left: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # those that fit
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: "dict[str, array[int]]" = field(default_factory=lambda: {side: array("I") for side in SIDES})
    too_long: int = 0
    cut: int = 0
    alike: int = 0
    longer_wins: int = 0
    of_unlike_length: int = 0
    both_unsafe: int = 0
    of_known_safety: int = 0
    prompts: dict[bool, set[bytes]] = field(default_factory=lambda: {True: set(), False: set()})
    seen: set[bytes] = field(default_factory=set)
    repeated: int = 0
    contradicted: int = 0
    agreed: dict[str, list[int]] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)

    def facts(self, max_length: int) -> dict[str, Any]:
        """What is told of it."""
        shared = len(self.prompts[True] & self.prompts[False])
        different = len(self.prompts[True] | self.prompts[False])
        dropped = self.dropped.copy()
        unread = sources.pop_unread(dropped)
        return {
            "read": self.rows,
            "usable": sum(self.left.values()),
            "held_out": self.left[True],
            "dropped": {reason: count for reason, count in dropped.items() if reason != TRUNCATED},
            "unread": unread,
            "prompts": different,
            "prompts_on_both_sides": shared,
            "tokens": {side: _quantiles(self.lengths[side]) for side in SIDES},
            "histogram": histogram([a + max(b, c) for a, b, c in zip(*self.lengths.values(), strict=True)]),
            "max_length": max_length,
            "prompts_too_long": self.too_long,
            "answers_cut": self.cut,
            "alike_once_cut": self.alike,
            "longer_wins": _share(self.longer_wins, self.of_unlike_length),
            "repeated": self.repeated,
            "contradicted": self.contradicted,
            "both_unsafe": self.both_unsafe if self.of_known_safety else None,
            "agreement": {name: _share(same, count) for name, (same, count) in self.agreed.items()},
            "no_agreement": self.silent,
        }


def audit_pairs(recipe: Recipe, preference: str, *, show: int, picture: Path | None) -> dict[str, Any]:
    """Read all of a preference's rows, and look at each."""
    axis = recipe.preference(preference)
    if axis.of:
        raise UserError(f"{preference} consists of the pairs of {', '.join(axis.of)}: look at each, with --pref NAME")
    base = bases.find(recipe.base)
    max_length = min(recipe.dpo.max_length, base.max_length)
    audit, shown = Audit(), list[dict[str, str]]()
    beside = {
        name: other
        for name, other in recipe.preferences.items()
        if name != preference and sources.location(other) == sources.location(axis)
    }
    read_alike = {name for name, other in beside.items() if not other.labels and other.columns == axis.columns}
    others = {name: beside[name] for name in beside if name in read_alike}
    audit.silent |= dict.fromkeys(beside.keys() - others.keys(), "it goes by other columns, or labels of its own")
    for name, other in others.items():
        try:
            labels_of(other)
        except UserError as fault:  # its own `data` and `dpo` will stop there; this one goes on
            audit.silent[name] = str(fault)
    for where, comparison, pair, aside in _ranked(axis, recipe.dpo, audit):
        if isinstance(pair, str):
            continue
        audit.left[aside] += _lengths(pair, base, max_length, audit)
        _bias(comparison, pair, audit)
        _agreement(where, comparison, pair, others, audit)
        _repetition(pair, audit)
        audit.prompts[aside].add(_alike(pair))
        if len(shown) < show:
            shown.append(_as_seen(pair, base, max_length))
    facts = {"preference": preference, "source": sources.name(axis), "rank": axis.rank, **audit.facts(max_length)}
    facts |= {"doubts": _doubts(facts, recipe.dpo), "shown": shown, "picture": str(picture) if picture else None}
    made = audit.made[False], audit.made[True]
    refused = None if audit.left[False] else no_rows_left(axis, made, Counter(facts["dropped"]), max_length)
    facts["refused"] = str(refused) if refused else None  # as `dpo` would
    if picture:
        from lora_align.metrics import plots

        plots.lengths(picture, facts["histogram"], max_length, preference)
    return facts


def summary(facts: Mapping[str, Any]) -> str:
    """Rows, then tables, then what is odd."""
    parts = ["\n".join(f"{name}: {row[name]}" for name in SIDES) for row in facts["shown"]]
    parts.append(
        f"{facts['source']} by {facts['rank']}: {count(facts['read'], 'row')}, {count(facts['usable'], 'pair')} of "
        f"{count(facts['prompts'], 'prompt')}, {facts['held_out']:,} held out"
    )
    if facts["dropped"]:
        parts[-1] += f"\ndropped: {pairs.reasons(Counter(facts['dropped']))}"
    columns = ["tokens", "shortest", "median", "95 %", "longest"]
    parts.append(table(columns, [[side, *(f"{n:,}" for n in of)] for side, of in facts["tokens"].items()]))
    parts.append("\n".join(["tokens of a prompt with its longer answer:", *bars(facts["histogram"])]))
    lines, agreed = [], facts["agreement"].items()
    if facts["longer_wins"] is not None:
        wins = facts["longer_wins"]
        lines.append(f"the longer answer wins {wins:.0%} of pairs, and {1 - wins:.0%} for `neg`")
    if facts["both_unsafe"] is not None:
        lines.append(f"of two unsafe answers: {count(facts['both_unsafe'], 'pair')}")
    lines += [f"{name} prefers the same answer in {share:.0%}" for name, share in agreed if share is not None]
    lines += [f"{name} is not set beside it: {why}" for name, why in facts["no_agreement"].items()]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else []), *filter(None, [facts["picture"]])])


def _ranked(axis: Preference, settings: Dpo, audit: Audit) -> Iterator[pairs.RankedComparison]:
    """As `dpo` reads them, to the last."""
    before, bad = "", 0
    for one in pairs.rank_comparisons(axis, settings.held_out, settings.limit, audit.dropped):
        audit.rows += one.where != before  # a row of several answers makes several comparisons
        before = one.where
        if isinstance(one.pair, str):
            bad += one.pair == sources.INVALID
        else:
            audit.made[one.aside] += 1
            if one.comparison.safe is not None:
                audit.of_known_safety += 1
                audit.both_unsafe += not any(one.comparison.safe)
        yield one
    audit.rows += audit.dropped[sources.INVALID] - bad  # rows that are none


def _repetition(pair: Pair, audit: Audit) -> None:
    """Whether the pair stood there before, and whether its answers did the other way round."""
    same, switched = (
        _digest([pair.prompt, *answers]) for answers in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))
    )
    audit.repeated += same in audit.seen
    audit.contradicted += switched in audit.seen
    audit.seen.add(same)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, default=vars).encode()).digest()[:8]


def _alike(pair: Pair) -> bytes:
    """Names a prompt, whatever its case, spaces and punctuation."""
    return _digest([WORD.findall(message.content.casefold()) for message in pair.prompt])


def _lengths(pair: Pair, base: Base, max_length: int, audit: Audit) -> bool:
    """Measure a pair, and say whether `dpo` would train on it."""
    [asked] = tokenise.truncate_texts([(pair.prompt, (pair.chosen, pair.rejected))], base.chat, max_length)
    ids, said = base.chat.answered(*asked)
    prompt, answers = len(ids), list(map(len, said))
    for side, length in zip(SIDES, (prompt, *answers), strict=True):
        audit.lengths[side].append(length)
    room = max_length - prompt
    audit.too_long += room < 1
    audit.cut += 0 < room < max(answers)
    audit.alike += room > 0 and said[0] != said[1] and said[0][:room] == said[1][:room]
    return tokenise.pair(ids, said, max_length, audit.dropped) is not None


def _bias(comparison: Comparison, pair: Pair, audit: Audit) -> None:
    lengths = len(pair.chosen), len(pair.rejected)
    if lengths[0] != lengths[1]:
        audit.of_unlike_length += 1
        audit.longer_wins += lengths[0] > lengths[1]


def _agreement(where: str, comparison: Comparison, pair: Pair, others: Mapping[str, Preference], audit: Audit) -> None:
    for name, other in others.items():
        if name in audit.silent:
            continue
        try:
            _, theirs = pairs.rank_comparison(comparison, other, where)
        except UserError as fault:  # its own `data` and `dpo` will stop there; this one goes on
            audit.silent[name] = str(fault)
            audit.agreed.pop(name, None)
            continue
        if not isinstance(theirs, str):
            counts = audit.agreed.setdefault(name, [0, 0])
            counts[0] += theirs.chosen == pair.chosen
            counts[1] += 1


def _as_seen(pair: Pair, base: Base, max_length: int) -> dict[str, str]:
    """Template and cut applied; what is learned from stands between ⟦ and ⟧."""
    dropped: Counter[str] = Counter()
    [tokens] = tokenise.pairs([pair], base.chat, max_length, dropped)
    decode = partial(text_of, base.chat.tokenizer)
    if tokens is None:
        why = f"(dropped: {pairs.reasons(dropped)})"
        return {"prompt": decode(base.chat.prompt_ids(pair.prompt)), "chosen": why, "rejected": ""}
    said = (f"⟦{decode(ids)}⟧" for ids in (tokens.chosen, tokens.rejected))
    return dict(zip(SIDES, (decode(tokens.prompt), *said), strict=True))


def _doubts(facts: Mapping[str, Any], settings: Dpo) -> list[str]:
    """What may spoil an adapter."""
    found = sources.unread_warnings(facts["unread"])
    longer = None if facts["rank"] in ("shorter", "longer") else facts["longer_wins"]
    if longer is not None and not 1 - TOO_BIASED <= longer <= TOO_BIASED:
        which, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        found.append(f"the {which} answer wins {share:.0%} of pairs: length is learned with it")
    if facts["repeated"]:
        found.append(f"repeated word for word: {count(facts['repeated'], 'pair')}")
    if facts["contradicted"]:
        found.append(
            f"contradicted: {count(facts['contradicted'], 'pair')} (the same answers, the other one preferred)"
        )
    if facts["usable"] and not facts["held_out"]:
        found.append("no pair is held out, so nothing will be measured: more prompts, or a larger dpo.held_out")
    elif 0 < facts["held_out"] < pairs.MIN_HELD_OUT:
        found.append(lora_trainer.too_few_pairs(facts["held_out"]))
    if facts["usable"] and (few := lora_trainer.too_few_steps(facts["usable"] - facts["held_out"], settings)):
        found.append(few)
    if alike := facts["prompts_on_both_sides"]:
        found.append(f"equal to a held-out prompt but for case, spaces or punctuation: {count(alike, 'prompt')}")
    if facts["both_unsafe"]:
        found.append(f"of two unsafe answers, one of which is learned: {count(facts['both_unsafe'], 'pair')}")
    if facts["prompts_too_long"] or facts["answers_cut"]:
        found.append(
            f"at max_length {facts['max_length']:,}: {count(facts['prompts_too_long'], 'prompt')} dropped, answers of "
            f"{count(facts['answers_cut'], 'pair')} cut"
            + (f", {facts['alike_once_cut']:,} of them dropped as alike" if facts["alike_once_cut"] else "")
        )
    return found


def _quantiles(lengths: Sequence[int]) -> list[int]:
    ordered = sorted(lengths) or [0]
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in SHARES]


def _share(part: int, of: int) -> float | None:
    return part / of if of else None

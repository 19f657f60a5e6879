"""The command `data`: show a preference's pairs as the model sees them, and find what may spoil training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_align.commands.audit_counts import SIDES, AuditCounts
from lora_align.console import count, table
from lora_align.data import pairs, sources
from lora_align.data.labels import labels_of
from lora_align.data.rows import Pair
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

QUANTILES = {"shortest": 0.0, "median": 0.5, "95%": 0.95, "longest": 1.0}
LENGTH_BIAS = 0.65  # warn if the longer, or the shorter, answer wins more than this share of pairs


@dataclass(frozen=True)
class Audit:
    """Facts about the rows of one preference, and warnings of what may spoil its adapters."""

    preference: str
    source: str
    rank: str
    read: int  # rows
    usable: int  # pairs that `dpo` would use, held-out ones included
    held_out: int
    dropped: Mapping[str, int]  # reason → number of dropped comparisons or rows
    unread: Mapping[str, int]  # column that is not read → number of rows in which it is filled
    prompts: int
    prompts_on_both_sides: int  # equal to a held-out prompt except for case, spaces and punctuation
    tokens: Mapping[str, Sequence[int]]  # side → quantiles of its lengths
    histogram: Sequence[tuple[int, int, int]]  # lengths of a prompt with its longer answer
    max_length: int
    prompts_too_long: int
    answers_truncated: int  # answers that exceed the space after their prompt
    equal_once_truncated: int  # pairs whose answers are equal once truncated
    longer_wins: float | None  # share of the pairs whose answers differ in length
    repeated: int
    contradicted: int
    both_unsafe: int | None  # None if the data does not say which answers are safe
    agreement: Mapping[str, float]  # other preference on this source → share of pairs with the same chosen answer
    no_agreement: Mapping[str, str]  # other preference on this source → why it is not compared
    doubts: Sequence[str]  # warnings
    shown: Sequence[Mapping[str, str]]  # the first pairs, as the model sees them
    picture: str | None
    refused: str | None  # why `dpo` would refuse this data

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return the first pairs, the counts, the lengths as a table and a histogram, and shares."""
        parts = ["\n".join(f"{side}: {pair[side]}" for side in SIDES) for pair in self.shown]
        parts.append(
            f"{self.source} by {self.rank}: {count(self.read, 'row')}, {count(self.usable, 'pair')} of "
            f"{count(self.prompts, 'prompt')}, {self.held_out:,} held out"
        )
        if self.dropped:
            parts[-1] += f"\ndropped: {pairs.reasons(Counter(self.dropped))}"
        lengths = [[side, *(f"{length:,}" for length in quantiles)] for side, quantiles in self.tokens.items()]
        parts.append(table(["tokens before truncation", *QUANTILES], lengths))
        parts.append("\n".join(["tokens of a prompt with its longer answer:", *bars(self.histogram)]))
        lines = []
        if (wins := self.longer_wins) is not None:
            lines.append(f"the longer answer wins {wins:.0%} of pairs of unequal length ({1 - wins:.0%} in `neg`)")
        if self.both_unsafe is not None:
            lines.append(f"both answers are unsafe: {count(self.both_unsafe, 'pair')}")
        lines += [f"{name} prefers the same answer in {share:.0%} of pairs" for name, share in self.agreement.items()]
        lines += [f"{name} is not compared: {why}" for name, why in self.no_agreement.items()]
        return "\n\n".join(filter(None, [*parts, "\n".join(lines), self.picture]))


def audit_pairs(recipe: Recipe, preference: str, *, show: int, picture: Path | None) -> Audit:
    """Read all rows of a preference as `dpo` would; return the first `show` pairs, counts and warnings."""
    if of := recipe.preference(preference).of:
        raise UserError(f"{preference} consists of the pairs of {', '.join(of)}; audit each of them: --pref NAME")
    [axis] = recipe.parts(preference)
    base = bases.find(recipe.base)
    max_length = min(recipe.dpo.max_length, base.max_length)
    others, incomparable = _same_source(recipe, preference)
    counts, shown = AuditCounts(base, max_length, others, incomparable), list[dict[str, str]]()
    for ranked in pairs.rank_comparisons(axis, recipe.dpo.held_out, recipe.dpo.limit, counts.dropped):
        counts.add(ranked)
        if not isinstance(ranked.pair, str) and len(shown) < show:
            shown.append(_as_seen(ranked.pair, base, max_length))
    unread = sources.pop_unread(counts.dropped)
    dropped = Counter({reason: number for reason, number in counts.dropped.items() if reason != TRUNCATED})
    made = counts.made[False], counts.made[True]
    refused = None if counts.usable[False] else str(no_rows_left(axis, made, dropped, max_length))
    audit = Audit(
        preference=preference,
        source=sources.name(axis),
        rank=axis.rank,
        read=counts.rows + counts.dropped[sources.INVALID] - counts.invalid + counts.dropped[pairs.TOO_FEW_ANSWERS],
        usable=counts.usable.total(),
        held_out=counts.usable[True],
        dropped=dict(dropped),
        unread=unread,
        prompts=len(counts.prompts[True] | counts.prompts[False]),
        prompts_on_both_sides=len(counts.prompts[True] & counts.prompts[False]),
        tokens={side: _quantiles(lengths) for side, lengths in counts.lengths.items()},
        histogram=histogram([a + max(b, c) for a, b, c in zip(*counts.lengths.values(), strict=True)]),
        max_length=max_length,
        prompts_too_long=counts.prompts_too_long,
        answers_truncated=counts.answers_truncated,
        equal_once_truncated=counts.equal_once_truncated,
        longer_wins=counts.longer_wins / counts.unequal_lengths if counts.unequal_lengths else None,
        repeated=counts.repeated,
        contradicted=counts.contradicted,
        both_unsafe=counts.both_unsafe if counts.known_safety else None,
        agreement={name: counts.same[name] / number for name, number in counts.compared.items()},
        no_agreement=counts.incomparable,
        doubts=(),
        shown=shown,
        picture=str(picture) if picture else None,
        refused=refused,
    )
    if picture:
        from lora_align.metrics import plots

        plots.lengths(picture, audit.histogram, max_length, preference)
    return replace(audit, doubts=_warnings(audit, recipe.dpo))


def _same_source(recipe: Recipe, preference: str) -> tuple[dict[str, Preference], dict[str, str]]:
    """Return the other preferences on the same source, and why some of them cannot be compared."""
    axis, others, incomparable = recipe.preference(preference), dict[str, Preference](), dict[str, str]()
    for name, other in recipe.preferences.items():
        if name == preference or sources.location(other) != sources.location(axis):
            continue
        if other.labels or other.columns != axis.columns:
            incomparable[name] = "it has its own `labels`" if other.labels else "it reads other columns"
            continue
        others[name] = other
        try:
            labels_of(other)
        except UserError as fault:  # `data` and `dpo` refuse that preference only
            incomparable[name] = str(fault)
    return others, incomparable


def _as_seen(pair: Pair, base: Base, max_length: int) -> dict[str, str]:
    """Return a pair with template and truncation applied; ⟦ and ⟧ enclose the tokens that have a loss."""
    dropped: Counter[str] = Counter()
    [tokens] = tokenise.pairs([pair], base.chat, max_length, dropped)
    decode = partial(text_of, base.chat.tokenizer)
    if tokens is None:
        why = f"(dropped: {pairs.reasons(dropped)})"
        return {"prompt": decode(base.chat.prompt_ids(pair.prompt)), "chosen": why, "rejected": ""}
    answers = (f"⟦{decode(ids)}⟧" for ids in (tokens.chosen, tokens.rejected))
    return dict(zip(SIDES, (decode(tokens.prompt), *answers), strict=True))


def _warnings(audit: Audit, settings: Dpo) -> list[str]:
    """Return warnings of what may spoil the preference's adapters."""
    warnings = sources.unread_warnings(audit.unread)
    longer = None if audit.rank in ("shorter", "longer") else audit.longer_wins
    if longer is not None and not 1 - LENGTH_BIAS <= longer <= LENGTH_BIAS:
        which, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        warnings.append(
            f"the {which} answer wins {share:.0%} of pairs of unequal length, which the adapter learns; balance them"
        )
    if audit.repeated:
        warnings.append(f"{count(audit.repeated, 'pair')} repeated word for word; remove the copies")
    if audit.contradicted:
        warnings.append(
            f"{count(audit.contradicted, 'pair')} contradicted (same answers, opposite label); correct the labels"
        )
    if audit.usable and not audit.held_out:
        warnings.append("no pair is held out, so nothing will be measured; add prompts, or raise dpo.held_out")
    elif 0 < audit.held_out < pairs.MIN_HELD_OUT:
        warnings.append(lora_trainer.too_few_pairs(audit.held_out))
    if audit.usable and (few_steps := lora_trainer.too_few_steps(audit.usable - audit.held_out, settings)):
        warnings.append(few_steps)
    if shared := audit.prompts_on_both_sides:
        warnings.append(
            f"{count(shared, 'prompt')} equal to a held-out prompt except for case, spaces or punctuation, so "
            "held-out figures are too good; remove them"
        )
    if audit.both_unsafe:
        warnings.append(
            f"{count(audit.both_unsafe, 'pair')} of two unsafe answers, of which the adapter learns one; drop them"
        )
    if audit.prompts_too_long or audit.answers_truncated:
        equal = audit.equal_once_truncated
        dropped = f", {equal:,} of these dropped as equal once truncated" if equal else ""
        warnings.append(
            f"at max_length {audit.max_length:,}: {count(audit.prompts_too_long, 'pair')} dropped (prompt too long), "
            f"{count(audit.answers_truncated, 'answer')} truncated{dropped}; raise dpo.max_length if memory allows"
        )
    return warnings


def _quantiles(lengths: Sequence[int]) -> list[int]:
    ordered = sorted(lengths) or [0]
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in QUANTILES.values()]

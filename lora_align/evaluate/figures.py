"""Figures from tables: means with intervals of one policy, and how often one beats another."""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.evaluate.measure import SCORE, Measured, Row
from lora_align.evaluate.test_set import ANY, RISKY, SAFE
from lora_align.metrics import intervals, repetition
from lora_align.metrics.intervals import Estimate

Figures = dict[str, Estimate]


def figures(found: Measured) -> Figures:
    """Return every figure of one policy."""
    told: Figures = {}
    for column in _scores(found.answers):
        told |= _of(column.removeprefix(SCORE), found.answers, itemgetter(column))
    for preference in dict.fromkeys(row["preference"] for row in found.margins):
        rows = [row for row in found.margins if row["preference"] == preference]
        pairs = [row["pair"] for row in rows]
        told[f"margin {preference}"] = intervals.mean([row["margin"] for row in rows], pairs)
        if any(row["margin"] for row in rows) and len(rows) >= MIN_HELD_OUT:  # the start policy has no margins
            told[f"accuracy {preference}"] = intervals.mean([float(row["margin"] > 0) for row in rows], pairs)
    for kind, name in ((SAFE, "refused safe"), (RISKY, "refused risky"), (ANY, "refused")):
        told |= _of(name, [row for row in found.answers if row["kind"] == kind], lambda row: row["refused"])
    told |= _of("words", found.answers, lambda row: row["words"])
    told |= _of("ended", found.answers, lambda row: row["ended"])
    told |= _of("repeated", found.answers, lambda row: row["repeated"])
    answers: dict[int, list[str]] = {}
    for row in found.answers:
        answers.setdefault(row["prompt"], []).append(row["answer"])
    told["distinct"] = intervals.mean([repetition.distinct(several) for several in answers.values()], list(answers))
    told |= _of("KL", found.answers, lambda row: row.get("kl"))
    if found.texts:
        nats, tokens = ([row[name] for row in found.texts] for name in ("nats", "tokens"))
        told["text loss"] = intervals.ratio(nats, tokens, [row["text"] for row in found.texts])
    if found.facts:
        known, facts = ([row[name] for row in found.facts] for name in ("known", "fact"))
        told["facts known"] = intervals.mean(known, facts)
    return told


def wins(one: Measured, other: Measured, less: Collection[str] = ()) -> Figures:
    """How often one's answer to a prompt scores higher than the other's, by each score, or lower, where `less` is
    better; ties count half, and an answer that has no score is not compared."""
    both, found = side_by_side(one, other), {}
    for column in _scores(one.answers):
        name, scored = column.removeprefix(SCORE), [(a, b) for a, b in both if None not in (a[column], b.get(column))]
        if scored:
            ahead = [(a[column] - b[column]) * (-1 if name in less else 1) for a, b in scored]
            won = [0.5 * ((by > 0) + (by >= 0)) for by in ahead]
            found[name] = intervals.mean(won, [a["prompt"] for a, _ in scored])
    return found


def side_by_side(one: Measured, other: Measured) -> list[tuple[Row, Row]]:
    """Both answers of one number to each prompt, where both were given."""
    theirs = {(row["prompt"], row["number"]): row for row in other.answers}
    return [(row, theirs[place]) for row in one.answers if (place := (row["prompt"], row["number"])) in theirs]


def _of(name: str, rows: Sequence[Row], value: Callable[[Row], Any]) -> Figures:
    """The mean over answers that have it."""
    known = [(float(value(row)), row["prompt"]) for row in rows if value(row) is not None]
    return {name: intervals.mean(*map(list, zip(*known, strict=True)))} if known else {}


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(SCORE)]

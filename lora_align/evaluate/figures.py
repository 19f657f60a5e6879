"""Reported numbers of a policy with 95 % intervals: means, and win rates against another policy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.evaluate.measure import SCORE, Measurement, Row
from lora_align.evaluate.test_set import ANY, RISKY, SAFE
from lora_align.metrics import intervals, repetition
from lora_align.metrics.intervals import Estimate

Figures = dict[str, Estimate]


def figures(measurement: Measurement) -> Figures:
    """Return every figure of one policy, by its name."""
    rows, result = measurement.answers, Figures()
    for column in _score_columns(rows):
        result |= _mean(column.removeprefix(SCORE), rows, itemgetter(column))
    for preference in dict.fromkeys(row["preference"] for row in measurement.margins):
        margins = [row for row in measurement.margins if row["preference"] == preference]
        pairs = [row["pair"] for row in margins]
        result[f"margin {preference}"] = intervals.mean([row["margin"] for row in margins], pairs)
        if any(row["margin"] for row in margins) and len(margins) >= MIN_HELD_OUT:  # the start policy's margins are 0
            result[f"accuracy {preference}"] = intervals.mean([float(row["margin"] > 0) for row in margins], pairs)
    for kind, name in ((SAFE, "refused safe"), (RISKY, "refused risky"), (ANY, "refused")):
        result |= _mean(name, [row for row in rows if row["kind"] == kind], itemgetter("refused"))
    for name in ("words", "ended", "repeated"):
        result |= _mean(name, rows, itemgetter(name))
    answers: dict[int, list[str]] = {}
    for row in rows:
        answers.setdefault(row["prompt"], []).append(row["answer"])
    result["distinct"] = intervals.mean([repetition.distinct(several) for several in answers.values()], list(answers))
    result |= _mean("KL", rows, lambda row: row.get("kl"))
    if measured := [row for row in rows if row.get("kl") is not None]:
        kl, tokens, prompts = ([row[name] for row in measured] for name in ("kl", "tokens", "prompt"))
        result["KL per token"] = intervals.ratio(kl, tokens, prompts)
    if measurement.texts:
        nats, tokens = ([row[name] for row in measurement.texts] for name in ("nats", "tokens"))
        result["text loss"] = intervals.ratio(nats, tokens, [row["text"] for row in measurement.texts])
    if measurement.facts:
        known, facts = ([row[name] for row in measurement.facts] for name in ("known", "fact"))
        result["facts known"] = intervals.mean(known, facts)
    return result


def wins(one: Measurement, other: Measurement, lower: Collection[str] = ()) -> Figures:
    """Return how often `one` beats `other` on the same prompt, by each score.

    The lower value wins for the scores in `lower`. A tie counts half. Two answers are left out if one has no score.
    """
    both, result = paired_answers(one, other), Figures()
    for column in _score_columns(one.answers):
        name, scored = column.removeprefix(SCORE), [(a, b) for a, b in both if None not in (a[column], b.get(column))]
        if scored:
            ahead = [(a[column] - b[column]) * (-1 if name in lower else 1) for a, b in scored]
            won = [0.5 * ((by > 0) + (by >= 0)) for by in ahead]
            result[name] = intervals.mean(won, [a["prompt"] for a, _ in scored])
    return result


def paired_answers(one: Measurement, other: Measurement) -> list[tuple[Row, Row]]:
    """Pair the answers of two policies by prompt and number; drop answers that only one policy has."""
    theirs = {(row["prompt"], row["number"]): row for row in other.answers}
    return [(row, theirs[key]) for row in one.answers if (key := (row["prompt"], row["number"])) in theirs]


def _mean(name: str, rows: Sequence[Row], value: Callable[[Row], Any]) -> Figures:
    """Return the mean over the rows that have a value; empty if none has."""
    known = [(float(value(row)), row["prompt"]) for row in rows if value(row) is not None]
    return {name: intervals.mean(*map(list, zip(*known, strict=True)))} if known else {}


def _score_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(SCORE)]

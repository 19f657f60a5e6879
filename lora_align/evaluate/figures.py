"""Reported numbers of a policy with 95 % intervals: means, and win rates against another policy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy
from numpy.typing import NDArray

from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.evaluate.measure import SCORE, Measurement, Row
from lora_align.evaluate.test_set import ANY, RISKY, SAFE
from lora_align.metrics import intervals, repetition
from lora_align.metrics.intervals import Estimate

Figures = dict[str, Estimate]


@dataclass(frozen=True)
class Counted:
    """A figure as a ratio of sums over groups, such as prompts: Σ above / Σ below."""

    axis: str  # what the groups are: prompts, the pairs of a preference, texts or facts
    above: Sequence[float]
    below: Sequence[float]
    of_group: Sequence[int]
    groups: int

    def estimate(self) -> Estimate:
        """Return the figure with its interval."""
        return intervals.ratio(self.above, self.below, self.of_group)

    def means(self, samples: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
        """Return the figure of each sample of groups [samples, groups]."""
        size = int(samples.max()) + 1  # another policy may have more groups
        sums = [numpy.bincount(self.of_group, of, size)[samples].sum(1) for of in (self.above, self.below)]
        means: NDArray[numpy.float64] = sums[0] / numpy.maximum(sums[1], 1e-12)
        return means


def figures(measurement: Measurement) -> Figures:
    """Return every figure of one policy, by its name."""
    return {name: one.estimate() for name, one in counted_figures(measurement).items()}


def counted_figures(measurement: Measurement) -> dict[str, Counted]:
    """Return every figure of one policy as sums over its groups."""
    rows, result = measurement.answers, dict[str, Counted]()
    prompts = 1 + max((row["prompt"] for row in rows), default=-1)

    def add(name: str, some: Sequence[Row], value: Callable[[Row], Any], below: str = "") -> None:
        """Add the mean over the answers that have a value, or the sum divided by that of a column `below`."""
        known = [row for row in some if value(row) is not None]
        if known:
            above = [float(value(row)) for row in known]
            divisor = [float(row[below]) if below else 1.0 for row in known]
            result[name] = Counted("prompts", above, divisor, [row["prompt"] for row in known], prompts)

    for column in _score_columns(rows):
        add(column.removeprefix(SCORE), rows, itemgetter(column))
    for preference in dict.fromkeys(row["preference"] for row in measurement.margins):
        margins = [row for row in measurement.margins if row["preference"] == preference]
        axis, pairs = f"pairs {preference}", [row["pair"] for row in margins]
        ones, values = [1.0] * len(pairs), [row["margin"] for row in margins]
        result[f"margin {preference}"] = Counted(axis, values, ones, pairs, 1 + max(pairs))
        if any(values) and len(margins) >= MIN_HELD_OUT:  # the start policy's margins are 0
            right = [float(value > 0) for value in values]
            result[f"accuracy {preference}"] = Counted(axis, right, ones, pairs, 1 + max(pairs))
    for kind, name in ((SAFE, "refused safe"), (RISKY, "refused risky"), (ANY, "refused")):
        add(name, [row for row in rows if row["kind"] == kind], itemgetter("refused"))
    for name in ("words", "ended", "repeated"):
        add(name, rows, itemgetter(name))
    answers: dict[int, list[str]] = {}
    for row in rows:
        answers.setdefault(row["prompt"], []).append(row["answer"])
    distinct = [repetition.distinct(several) for several in answers.values()]
    result["distinct"] = Counted("prompts", distinct, [1.0] * len(answers), list(answers), prompts)
    add("KL", rows, lambda row: row.get("kl"))
    add("KL per token", rows, lambda row: row.get("kl"), "tokens")
    if texts := measurement.texts:
        nats, tokens, places = ([row[name] for row in texts] for name in ("nats", "tokens", "text"))
        result["text loss"] = Counted("texts", nats, tokens, places, 1 + max(places))
    if facts := measurement.facts:
        known, places = ([row[name] for row in facts] for name in ("known", "fact"))
        result["facts known"] = Counted("facts", list(map(float, known)), [1.0] * len(facts), places, 1 + max(places))
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


def _score_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(SCORE)]

"""Means with intervals: what they might have been with other prompts of the same kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 1000
WITHIN = (2.5, 97.5)  # percentiles of them


@dataclass(frozen=True)
class Estimate:
    """A mean, and where 95 of 100 such means lie."""

    value: float
    low: float
    high: float
    count: int  # of what it is the mean of


def mean(values: Sequence[float], groups: Sequence[int]) -> Estimate:
    """Of values that belong to prompts, say: those of one group are drawn together, as they resemble each other."""
    return ratio(values, [1.0] * len(values), groups)


def ratio(above: Sequence[float], below: Sequence[float], groups: Sequence[int]) -> Estimate:
    """The quotient of two sums, with whole groups drawn anew, as many as there are."""
    _, where = numpy.unique(numpy.asarray(groups), return_inverse=True)
    sums = numpy.stack([numpy.bincount(where, numpy.asarray(part, dtype=float)) for part in (above, below)])  # [2, g]
    count = sums.shape[1]
    drawn = numpy.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    totals = sums[:, drawn].sum(2)  # [2, resamples]
    low, high = numpy.percentile(totals[0] / totals[1], WITHIN)
    return Estimate(float(sums[0].sum() / sums[1].sum()), float(low), float(high), len(above))

"""Bootstrap confidence intervals of means and ratios, resampled by group, such as by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 1000
WITHIN = (2.5, 97.5)  # percentiles of the resamples: a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int  # number of values


def mean(values: Sequence[float], groups: Sequence[int]) -> Estimate:
    """Return the mean of `values`. Values of one group, such as answers to one prompt, are resampled together."""
    return ratio(values, [1.0] * len(values), groups)


def ratio(numerator: Sequence[float], denominator: Sequence[float], groups: Sequence[int]) -> Estimate:
    """Return sum(numerator) / sum(denominator), with an interval from resampling whole groups."""
    _, where = numpy.unique(numpy.asarray(groups), return_inverse=True)
    sums = numpy.stack(
        [numpy.bincount(where, numpy.asarray(part, dtype=float)) for part in (numerator, denominator)]
    )  # [2, g]
    count = sums.shape[1]
    sampled = numpy.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    totals = sums[:, sampled].sum(2)  # [2, resamples]
    low, high = numpy.percentile(totals[0] / totals[1], WITHIN)
    return Estimate(float(sums[0].sum() / sums[1].sum()), float(low), float(high), len(numerator))

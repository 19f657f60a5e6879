"""Quality of scores against the truth: rank correlation, concordance, calibration."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 5


def rank_correlations(columns: Tensor) -> Tensor:
    """Return Spearman's correlations [k, k] of columns [n, k].

    For each pair of columns, rows with a nan are left out.
    """
    count = columns.shape[1]
    correlations = torch.eye(count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            both = columns[:, [i, j]][~columns[:, [i, j]].isnan().any(1)]
            correlations[i, j] = correlations[j, i] = _correlation(ranks(both[:, 0]), ranks(both[:, 1]))
    return correlations


def ranks(values: Tensor) -> Tensor:
    """Return ascending ranks from 0; equal values share their mean rank."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    mean_ranks: Tensor = (first + (counts - 1) / 2.0)[where]
    return mean_ranks.double()


def concordance(scores: Tensor, truth: Tensor) -> float:
    """Return how often the better-rated of two answers has the higher score; equal scores count half."""
    higher = truth[:, None] > truth[None, :]
    if not higher.any():
        return math.nan
    wins = (scores[:, None] > scores[None, :]).double() + 0.5 * (scores[:, None] == scores[None, :]).double()
    return float(wins[higher].mean())


def calibration(predicted: Tensor, observed: Tensor) -> list[tuple[float, float]]:
    """Return the mean predicted and the mean observed value in BINS equal parts, ordered by prediction."""
    order = predicted.argsort()
    parts = torch.tensor_split(order, min(BINS, len(order)))
    return [(float(predicted[part].mean()), float(observed[part].mean())) for part in parts]


def calibration_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the mean absolute difference of predicted and observed values."""
    return sum(abs(predicted - observed) for predicted, observed in pairs) / len(pairs)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Return Pearson's correlation; nan if one side is constant."""
    if len(first) < 2:
        return math.nan
    first, second = first - first.mean(), second - second.mean()
    norm = first.norm() * second.norm()
    return float(first @ second / norm) if norm > 0 else math.nan

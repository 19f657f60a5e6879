"""Figures about scores: how well they order answers, how far they can be believed, what they go along with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 5


def rank_correlations(columns: Tensor) -> Tensor:
    """Spearman's correlation of every two columns [n, k]: [k, k]; rows where either is nan do not count."""
    count = columns.shape[1]
    found = torch.eye(count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            both = columns[:, [i, j]][~columns[:, [i, j]].isnan().any(1)]
            found[i, j] = found[j, i] = _correlation(ranks(both[:, 0]), ranks(both[:, 1]))
    return found


def ranks(values: Tensor) -> Tensor:
    """Places from 0 in ascending order; equal values share the mean of theirs."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    places: Tensor = (first + (counts - 1) / 2.0)[where]
    return places.double()


def concordance(scores: Tensor, truth: Tensor) -> float:
    """How often, of two answers that were rated differently, the better one has the higher score; ties count half."""
    higher = truth[:, None] > truth[None, :]
    if not higher.any():
        return math.nan
    wins = (scores[:, None] > scores[None, :]).double() + 0.5 * (scores[:, None] == scores[None, :]).double()
    return float(wins[higher].mean())


def calibration(said: Tensor, seen: Tensor) -> list[tuple[float, float]]:
    """Mean of what was said and of what was seen, in parts of equal size from the lowest said to the highest."""
    order = said.argsort()
    parts = torch.tensor_split(order, min(BINS, len(order)))
    return [(float(said[part].mean()), float(seen[part].mean())) for part in parts]


def calibration_error(points: Sequence[tuple[float, float]]) -> float:
    """Mean distance of what was said from what was seen."""
    return sum(abs(said - seen) for said, seen in points) / len(points)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; nan where one of them does not vary."""
    if len(first) < 2:
        return math.nan
    first, second = first - first.mean(), second - second.mean()
    norm = first.norm() * second.norm()
    return float(first @ second / norm) if norm > 0 else math.nan

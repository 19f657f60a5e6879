"""The size of a mix in a direction: as large as a KL budget allows."""

from collections.abc import Mapping

import torch
from torch import Tensor

LARGEST = 3.0  # weight
STEPS = 40  # of the bisection


def kl_of(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """Estimate KL(start‖mix) per token from each vector's scores of tokens that the start policy sampled.

    The log-ratio of a mix is taken as the weighted sum of its vectors' log-ratios. r − 1 − log r, for r = π/π_start,
    has the KL as its mean and is never negative.
    """
    total = sum((weight * scores[name] for name, weight in weights.items()), torch.zeros(()))
    return float((total.exp() - 1 - total).mean())


def sized(scores: Mapping[str, Tensor], direction: Mapping[str, float], budget: float) -> dict[str, float]:
    """Return the direction times the largest factor whose mix is within a KL budget, up to a weight of LARGEST."""
    largest = max(map(abs, direction.values()), default=0.0)
    if not largest:
        return dict(direction)
    low, high = 0.0, LARGEST / largest
    if kl_of(scores, _times(direction, high)) <= budget:
        return _times(direction, high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_of(scores, _times(direction, middle)) <= budget else (low, middle)
    return _times(direction, low)


def _times(direction: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * weight for name, weight in direction.items()}

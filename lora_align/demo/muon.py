"""Muon (kellerjordan.github.io/posts/muon) for processors that do not multiply bfloat16 numbers themselves.

`torch.optim.Muon` orthogonalises in bfloat16. Where that is emulated, it is slow.
Here the products are made in float32 and then rounded to bfloat16, which is the same but for the order of the sums.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)  # takes singular values from 0 to 1 near 1 in five steps
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, each matrix scaled so that its step is as large as AdamW's."""

    def __init__(self, matrices: Iterable[Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton-Schulz in bfloat16."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    first, third, fifth = QUINTIC
    wide = _rounded(wide)
    wide = _rounded(wide / _rounded(wide.norm()).clamp(min=1e-7))
    for _ in range(STEPS):
        gram = _rounded(wide @ wide.T)
        wide = _rounded(
            torch.addmm(wide, _rounded(torch.addmm(gram, gram, gram, beta=third, alpha=fifth)), wide, beta=first)
        )
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def _rounded(values: Tensor) -> Tensor:
    return values.bfloat16().float()

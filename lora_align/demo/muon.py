"""The Muon optimiser (kellerjordan.github.io/posts/muon) for CPUs without bfloat16 arithmetic.

`torch.optim.Muon` orthogonalises in bfloat16, which is slow where the CPU emulates it. This version multiplies in
float32 and rounds to bfloat16. The result is the same up to the order of summation.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)  # coefficients that bring singular values in (0, 1] near 1 in five steps
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, scaled for each matrix to the step size of AdamW."""

    def __init__(self, matrices: Iterable[Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iteration with bfloat16 rounding."""
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

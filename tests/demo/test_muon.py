"""Muon against torch.optim.Muon."""

import pytest
import torch
from torch.nn import Parameter

from lora_align.demo.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (384, 128)])
def test_steps_equal_those_of_torch_up_to_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = Parameter(torch.randn(shape))
    theirs = Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = (
        Muon([ours], lr=1e-2),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.01 * expected.norm()
    assert expected.norm() > 0.5


def test_orthogonal_brings_singular_values_near_1() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(64, 128)))
    assert 0.6 < values.min() <= values.max() < 1.3

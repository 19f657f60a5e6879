"""4-bit layers that keep their weight dequantised, so that a CPU does not dequantise it anew in every pass."""

from copy import copy
from typing import Any

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

SHARE = 0.5  # of the memory that is available, which the dequantised weights may take at most


class DequantisedLinear4bit(Linear4bit):
    """Compute with `dense`, the very values the 4-bit weight stands for. The 4-bit weight stays what is saved."""

    dense: Tensor  # [out, in], neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        """Return what `Linear4bit` returns, to the last bit."""
        bias = None if self.bias is None else self.bias.to(self.dense.dtype)
        return linear(x.to(self.dense.dtype), self.dense, bias).to(x.dtype)


def fits(weights: int, dtype: torch.dtype) -> bool:
    """Return whether this machine has room for so many weights in that dtype."""
    return weights * dtype.itemsize <= SHARE * psutil.virtual_memory().available


def keep_dequantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantise every 4-bit layer of a model on a CPU once, if memory allows it for all of them."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if fits(sum(layer.in_features * layer.out_features for layer in layers), dtype):
        for layer in layers:
            state = copy(layer.weight.quant_state)
            state.dtype = dtype  # the weight's own, of a base that came in 4-bit, may be rounder
            layer.__class__ = DequantisedLinear4bit
            layer.dense = dequantize_4bit(layer.weight.data, state)

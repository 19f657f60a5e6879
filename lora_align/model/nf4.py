"""NF4 layers of bitsandbytes: a quick import and, on a CPU, no repacking and weights dequantised once."""

from collections.abc import Callable
from copy import copy
from functools import cache, partial, wraps
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_align import distributed


def _compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Stand in for `torch.compile`: import the compiler only when the compiled function is first called."""
    if function is None:
        return partial(_compile_when_called, **options)

    @cache
    def compiled() -> Any:
        return torch.compile(function, **options)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return called


# bitsandbytes compiles fallbacks that no device here uses. Importing torch's compiler for them takes over a second.
_torch_compile, torch.compile = torch.compile, _compile_when_called  # type: ignore[assignment]
try:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit
finally:
    torch.compile = _torch_compile

__all__ = [
    "DequantisedLinear4bit",
    "Linear4bit",
    "dense_weight",
    "dequantise_once",
    "disable_cpu_repacking",
    "fits_dequantised",
    "quantised_layers",
    "through_nf4",
]

SHARE = 0.5  # the largest share of the available memory for dequantised weights


class DequantisedLinear4bit(Linear4bit):
    """Compute with `dense`, the dequantised weight. Saving still writes the 4-bit weight."""

    dense: Tensor  # [out, in], neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output, bit for bit equal to that of `Linear4bit`."""
        bias = None if self.bias is None else self.bias.to(self.dense.dtype)
        return linear(x.to(self.dense.dtype), self.dense, bias).to(x.dtype)


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    On processors with AVX512-BF16 a forward pass in eval mode repacks a weight in place for a faster kernel
    that has no autograd. Training through the repacked weight silently computes wrong gradients.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def fits_dequantised(count: int, dtype: torch.dtype) -> bool:
    """Return whether `count` values of this dtype fit into SHARE of the available memory, in every local process."""
    available = psutil.virtual_memory().available / distributed.local_world_size()
    return bool(count * dtype.itemsize <= SHARE * available)


def dequantise_once(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantise every 4-bit layer of a model on a CPU once, if all of them fit into memory."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if fits_dequantised(sum(layer.in_features * layer.out_features for layer in layers), dtype):
        for layer in layers:
            state = copy(layer.weight.quant_state)
            state.dtype = dtype  # the state of a base stored in 4-bit may name a dtype that rounds more
            layer.__class__ = DequantisedLinear4bit
            layer.dense = dequantize_4bit(layer.weight.data, state)


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that transformers quantises, by name: every linear layer except the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: layer
        for name, layer in model.named_modules()
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and layer is not head
    }


def through_nf4(weight: Tensor, *, double_quant: bool) -> Tensor:
    """Return what remains of a weight [out, in] after quantisation to NF4, in float32."""
    stored, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    state.dtype = torch.float32
    return dequantize_4bit(stored, state)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return a linear layer's whole weight [out, in]: dequantised if 4-bit, gathered if sharded."""
    stored = layer.get_parameter("weight")
    weight = stored.full_tensor() if hasattr(stored, "full_tensor") else stored.data
    state = getattr(stored, "quant_state", None) or getattr(layer, "quant_state", None)
    return weight if state is None else dequantize_4bit(weight, state)

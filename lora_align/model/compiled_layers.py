"""Compilation of a model's layers with `torch.compile` while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_align.errors import RunFailedError, first_line


@contextmanager
def compiled_layers(model: Module, *, wanted: bool = True) -> Iterator[None]:
    """Compile every layer with dynamic shapes while the `with` block runs. Restore the eager layers afterwards."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    except BackendCompilerFailed as fault:
        raise RunFailedError(
            f"torch.compile failed on the base ({first_line(fault)}); set compile = false in the stage's table"
        ) from fault
    finally:
        for layer in layers:
            layer._compiled_call_impl = None

"""A 4-bit base that is divided among processes: each keeps a part of every layer, and has one or two of them whole.

What is frozen is divided and nothing else: adapters, optimisers and checkpoints stay what they are. As a layer comes
together only when every process asks for it, all go through the base equally often, and so do those that are done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_align import processes
from lora_align.errors import OutOfStepError, UserError
from lora_align.model.nf4 import Linear4bit

IDLE = [[0, 0]]  # tokens that are read for company


def shard_base(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Leave each process its part of a loaded base's 4-bit weights, and the rest whole, on its device."""
    decoder = model.get_decoder()
    linears = [module for module in decoder.modules() if isinstance(module, Linear4bit)]
    weights: list[Any] = [linear.weight for linear in linears]
    kinds = [(weight.compress_statistics, weight.quant_type, weight.quant_state) for weight in weights]
    whole = {*model.parameters()} - {*weights}
    mesh = init_device_mesh(device.type, (processes.count(),))
    for layer in [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for linear, (double, kind, state) in zip(linears, kinds, strict=True):  # PEFT asks a weight for them
        weight: Any = linear.weight  # another one by now
        weight.compress_statistics, weight.quant_type = double, kind
        state.to(device)
        linear.quant_state = state  # which bitsandbytes looks for here once a weight has lost it
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # a trainer is to leave it as it is
    processes.in_step = True
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether this process has a part of it only."""
    return isinstance(model.get_decoder(), FSDPModule)


@contextmanager
def in_step(model: PreTrainedModel, *, learning: bool = False) -> Iterator[None]:
    """A process that is done, or fails, keeps running the base's forward until all are done: they gather its parts."""
    if not is_sharded(model):
        yield
        return
    asking = model.get_decoder().register_forward_pre_hook(_asked)
    try:
        yield
    except OutOfStepError:
        raise
    except UserError:
        asking.remove()
        _keep_company(model, learning)
        raise
    asking.remove()
    _keep_company(model, learning)


def _asked(_decoder: Module, _inputs: object) -> None:
    """As a hook before the base is gone through: tells those who may be done."""
    _anybody(reads=True)


def _anybody(*, reads: bool) -> bool:
    """Whether any process is about to go through the base; all of them ask at once."""
    count = torch.tensor(float(reads), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(count)
    return bool(count)


def _keep_company(model: PreTrainedModel, learning: bool) -> None:
    ids = torch.tensor(IDLE, device=model.device)
    while _anybody(reads=False):
        with torch.set_grad_enabled(learning):
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        if learning:
            (states.sum() * 0).backward()

"""FSDP for the frozen 4-bit base: each process stores a shard of every layer and gathers one or two layers at a time.

Only the base is sharded. Adapters, optimizer states and checkpoints stay whole. Gathering is a collective operation, so
all processes must run the base's forward equally often: a process that is done runs dummy passes until all are done.
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

from lora_align import distributed
from lora_align.errors import OutOfStepError, UserError
from lora_align.model.nf4 import Linear4bit

DUMMY = [[0, 0]]  # token ids of a dummy pass


def shard_base(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard a loaded base's 4-bit weights over all processes. Move the shard and all other tensors to `device`."""
    decoder = model.get_decoder()
    linears = [module for module in decoder.modules() if isinstance(module, Linear4bit)]
    weights: list[Any] = [linear.weight for linear in linears]
    kinds = [(weight.compress_statistics, weight.quant_type, weight.quant_state) for weight in weights]
    whole = {*model.parameters()} - {*weights}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for layer in [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for linear, (double, kind, state) in zip(linears, kinds, strict=True):  # restores the attributes that PEFT reads
        weight: Any = linear.weight  # FSDP has replaced it
        weight.compress_statistics, weight.quant_type = double, kind
        state.to(device)
        linear.quant_state = state  # bitsandbytes looks here if the weight has none
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # keeps the trainer from wrapping it
    distributed.base_is_sharded = True
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether the model's weights are sharded."""
    return isinstance(model.get_decoder(), FSDPModule)


@contextmanager
def keep_in_step(model: PreTrainedModel, *, training: bool = False) -> Iterator[None]:
    """Keep processes with a sharded base in step: at the end, run dummy passes until all processes are done.

    A process that fails with a UserError does the same before it raises. With `training` dummy passes run backward too.
    """
    if not is_sharded(model):
        yield
        return
    hook = model.get_decoder().register_forward_pre_hook(_announce_pass)
    try:
        yield
    except OutOfStepError:
        raise
    except UserError:
        hook.remove()
        _run_dummy_passes(model, training)
        raise
    hook.remove()
    _run_dummy_passes(model, training)


def _announce_pass(_decoder: Module, _inputs: object) -> None:
    _any_process(runs=True)


def _any_process(*, runs: bool) -> bool:
    """Return whether any process is about to run the base's forward (an all-reduce)."""
    count = torch.tensor(float(runs), device=torch.accelerator.current_accelerator(check_available=True) or "cpu")
    torch.distributed.all_reduce(count)
    return bool(count)


def _run_dummy_passes(model: PreTrainedModel, training: bool) -> None:
    ids = torch.tensor(DUMMY, device=model.device)
    while _any_process(runs=False):
        with torch.set_grad_enabled(training):
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        if training:
            (states.sum() * 0).backward()

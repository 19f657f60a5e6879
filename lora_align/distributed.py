"""Distributed training with torchrun or `accelerate launch`: ranks, all-gather, barrier, and work on rank 0."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from lora_align.errors import OutOfStepError, UserError

RANK_TIMEOUT = timedelta(days=1)  # other ranks wait this long while rank 0 reads data or plots
Result = TypeVar("Result")
base_is_sharded = False  # all ranks must then run the base's forward together


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the local rank, which is the index of this process's GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def check(command: str, *, trains: bool) -> None:
    """Refuse several processes for a command that does not train. Refuse accelerate's own FSDP and DeepSpeed.

    These would also shard adapters, optimizer and checkpoints. The recipe sets the precision, not accelerate.
    """
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # would override the trainers' own settings
    if not trains and world_size() > 1:
        raise UserError(f"{command} runs in one process, but {world_size()} were launched; start it without a launcher")
    for plugin in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() == "true":
            raise UserError(
                f"accelerate is configured for {plugin}, which would also shard adapters, optimizer and checkpoints; "
                "to shard the base alone, use "
                "accelerate launch --multi_gpu --num_processes N -m lora_align … --set base.fsdp=true"
            )


def all_gather(mine: Result) -> list[Result]:
    """All-gather an object: return the list of all ranks' objects on every rank."""
    if world_size() == 1:
        return [mine]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.accelerator.is_available(), timeout=RANK_TIMEOUT)
    return gather_object([mine])  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait for all ranks (barrier)."""
    all_gather(None)


def on_all_ranks(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every rank and return all results on every rank. A UserError of one rank is raised on all."""
    result, fault = None, None
    try:
        result = work()
    except OutOfStepError:
        raise
    except UserError as mine:
        fault = mine
    results = all_gather((result, fault))
    for _, failed in results:
        if failed:
            raise failed
    return [result for result, _ in results]  # type: ignore[misc]


def on_rank_0(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return the result on every rank."""
    return on_all_ranks(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def local_rank_0_first(work: Callable[[], Result]) -> Result:
    """Run `work` on local rank 0 of each machine first, then on the other ranks, which find its result in the cache."""
    result = on_all_ranks(lambda: work() if local_rank() == 0 else None)[rank()]
    return result if local_rank() == 0 else work()  # type: ignore[return-value]

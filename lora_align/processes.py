"""Ranks of processes that torchrun or `accelerate launch` started: rank, barrier, and work on rank 0."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from lora_align.errors import OutOfStepError, UserError

PATIENCE = timedelta(days=1)  # the other ranks wait so long while rank 0 reads data or plots
Found = TypeVar("Found")
in_step = False  # whether all ranks must run the base together, because each holds a part of it


def world_size() -> int:
    """Return the world size."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the local rank, which is the index of this process's GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def check(command: str, *, trains: bool) -> None:
    """Refuse several processes for commands that do not train, and refuse accelerate's own FSDP or DeepSpeed.

    Those would also shard adapters, optimizer and checkpoints. The recipe sets the precision, not accelerate.
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


def all_gather(mine: Found) -> list[Found]:
    """Gather an object from every rank and return the list on every rank (all-gather)."""
    if world_size() == 1:
        return [mine]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return gather_object([mine])  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait for all ranks (barrier)."""
    all_gather(None)


def on_all_ranks(work: Callable[[], Found]) -> list[Found]:
    """Run `work` on every rank and return all results on every rank. A UserError of one rank is raised on all."""
    found, fault = None, None
    try:
        found = work()
    except OutOfStepError:
        raise
    except UserError as mine:
        fault = mine
    results = all_gather((found, fault))
    for _, failed in results:
        if failed:
            raise failed
    return [found for found, _ in results]  # type: ignore[misc]


def on_rank_0(work: Callable[[], Found]) -> Found:
    """Run `work` on rank 0 and return the result on every rank."""
    return on_all_ranks(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def local_rank_0_first(work: Callable[[], Found]) -> Found:
    """Run `work` on local rank 0 of each machine, then on the other ranks, which find the cached result."""
    found = on_all_ranks(lambda: work() if local_rank() == 0 else None)[rank()]
    return found if local_rank() == 0 else work()  # type: ignore[return-value]

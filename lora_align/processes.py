"""The processes that torchrun or `accelerate launch` has started, if one has: all of them train, the first one speaks
and writes."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from lora_align.errors import OutOfStepError, UserError

PATIENCE = timedelta(days=1)  # while the first one reads, or draws a picture
Found = TypeVar("Found")
in_step = False  # whether all of them go through the base at once, as each has a part of it


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def number() -> int:
    """This one's, from 0 on."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def here() -> int:
    """This process's number on this machine, which is the number of its card."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def check(command: str, *, trains: bool) -> None:
    """Refuse to do together what one process does, and to have the base divided by accelerate: its way is to divide
    adapters, optimiser and checkpoints too. What it would compute in, the recipe says."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # which trainers believe more than their own settings
    if not trains and count() > 1:
        raise UserError(f"{command}: one process does this, and {count()} were launched")
    for divides in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{divides}", "").lower() == "true":
            raise UserError(
                f"accelerate is configured for {divides}, which would divide adapters, optimiser and checkpoints, too; "
                "here only the base is divided, where the recipe says so: "
                "accelerate launch --multi_gpu --num_processes N -m lora_align … --set base.fsdp=true"
            )


def gathered(mine: Found) -> list[Found]:
    """What all of them have, in their order; nobody goes on before everybody has come here."""
    if count() == 1:
        return [mine]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return gather_object([mine])  # type: ignore[no-any-return]


def meet() -> None:
    """Wait until all have come here."""
    gathered(None)


def together(work: Callable[[], Found]) -> list[Found]:
    """Everyone's part of some work, in their order. What fails for one fails for all."""
    found, fault = None, None
    try:
        found = work()
    except OutOfStepError:
        raise
    except UserError as mine:
        fault = mine
    told = gathered((found, fault))
    for _, failed in told:
        if failed:
            raise failed
    return [found for found, _ in told]  # type: ignore[misc]


def by_first(work: Callable[[], Found]) -> Found:
    """What the first one makes of it, for all."""
    return together(lambda: work() if number() == 0 else None)[0]  # type: ignore[return-value]


def first_here(work: Callable[[], Found]) -> Found:
    """On each machine its first one does it, then the others, who find it done."""
    found = together(lambda: work() if here() == 0 else None)[number()]
    return found if here() == 0 else work()  # type: ignore[return-value]

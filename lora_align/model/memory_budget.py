"""How much is computed at once: as much as memory bears, which is found out where it runs out."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from lora_align import processes
from lora_align.errors import OutOfStepError, RunFailedError

NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
Result = TypeVar("Result")


@dataclass
class MemoryBudget:
    """Rows, or tokens, that fit. Halved where memory runs out, and kept so: what follows need not fail first."""

    size: int
    advice: str = ""  # to whom not even the least fits

    def attempt(self, work: Callable[[int], Result], least: int = 1) -> Result | None:
        """What `work` makes of as much; None where it did not fit, and half of it, down to `least`, may."""
        try:
            return work(self.size)
        except (RuntimeError, MemoryError) as fault:
            if not _out_of_memory(fault):
                raise
            if processes.in_step:
                raise OutOfStepError(
                    f"memory ran out with {self.size:,} at once, and processes that share a divided base cannot "
                    "try again with fewer: lower tokens_per_batch or max_length"
                ) from fault
            if self.size <= least:
                remedy = f"; {self.advice}" if self.advice else ""
                raise RunFailedError(f"memory ran out with as little as can be computed at once{remedy}") from fault
            self.size //= 2
        gc.collect()  # outside the handler, which holds on to the frames that failed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _out_of_memory(fault: Exception) -> bool:
    return isinstance(fault, MemoryError) or any(words in str(fault) for words in NO_MEMORY)

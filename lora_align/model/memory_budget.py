"""A budget of rows or tokens to compute at once. It is halved when memory runs out."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lora_align import distributed
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
    """The number of rows, or tokens, to compute at once. A halved budget stays halved for later batches."""

    size: int
    advice: str = "use shorter prompts and answers, a smaller base, or a device with more memory"
    whole: int = field(init=False)  # the size before any halving

    def __post_init__(self) -> None:
        self.whole = self.size

    def attempt(self, work: Callable[[int], Result], smallest: int = 1) -> Result | None:
        """Call `work(size)` and return its result. If memory runs out, halve `size` and return None.

        Fail if memory runs out at `smallest` or below.
        """
        try:
            return work(self.size)
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            if distributed.base_is_sharded:
                raise OutOfStepError(
                    f"out of memory with {self.size:,} rows or tokens at once; with a sharded base they cannot be "
                    "halved: lower tokens_per_batch or max_length"
                ) from fault
            if self.size <= smallest:
                raise RunFailedError(f"out of memory even with the smallest batch; {self.advice}") from fault
            self.size //= 2
        gc.collect()  # outside the handler, because there the exception still references the failed frames
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None


def is_out_of_memory(fault: Exception) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(fault, MemoryError) or any(words in str(fault) for words in NO_MEMORY)

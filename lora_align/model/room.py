"""How much is computed at once: as much as memory bears, which is found out where it runs out."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
Result = TypeVar("Result")


@dataclass
class Room:
    """Rows that fit. Halved where memory runs out, and kept so: what follows need not fail first."""

    rows: int

    def attempt(self, work: Callable[[int], Result]) -> Result | None:
        """What `work` makes of as many rows; None where they did not fit, and half as many may."""
        try:
            return work(self.rows)
        except (RuntimeError, MemoryError) as fault:
            if self.rows == 1 or not _out_of_memory(fault):
                raise
            self.rows //= 2
        gc.collect()  # outside the handler, which holds on to the frames that failed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _out_of_memory(fault: Exception) -> bool:
    return isinstance(fault, MemoryError) or any(words in str(fault) for words in NO_MEMORY)

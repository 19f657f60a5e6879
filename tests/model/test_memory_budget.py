"""The errors that halve the batch size."""

import pytest

from lora_align.model.memory_budget import MemoryBudget


@pytest.mark.parametrize(
    "fault",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_out_of_memory_halves_the_size(fault: str) -> None:
    def work(size: int) -> None:
        raise RuntimeError(fault)

    budget = MemoryBudget(8)
    assert budget.attempt(work) is None
    assert budget.size == 4


def test_other_errors_are_raised() -> None:
    def work(size: int) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        MemoryBudget(8).attempt(work)

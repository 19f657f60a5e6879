"""What counts as memory that ran out."""

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
def test_memory_that_runs_out_halves_the_room(fault: str) -> None:
    def work(size: int) -> None:
        raise RuntimeError(fault)

    room = MemoryBudget(8)
    assert room.attempt(work) is None
    assert room.size == 4


def test_other_faults_pass_through() -> None:
    def work(size: int) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        MemoryBudget(8).attempt(work)

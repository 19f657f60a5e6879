"""Files written one tensor at a time are ordinary safetensors files."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_align.adapters.safetensors_stream import DTYPES, TensorFile, write

tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.integers(1, 5), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(tensors)
def test_written_files_are_read_by_safetensors_and_by_us(tmp_path_factory: pytest.TempPathFactory, kinds: dict) -> None:  # type: ignore[type-arg]
    draw = torch.Generator().manual_seed(0)
    written = {name: torch.randn(a, b, generator=draw).to(dtype) for name, (dtype, a, b) in kinds.items()}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write(path, written.items(), list(written))
    theirs, ours = load_file(path), TensorFile(path)
    assert set(theirs) == set(ours.entries) == set(written)
    for name, tensor in written.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.read(name), tensor)
        assert theirs[name].dtype == tensor.dtype


def test_write_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    produced: list[weakref.ref[torch.Tensor]] = []

    def produce() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(8):
            tensor = torch.zeros(4, 4)
            produced.append(weakref.ref(tensor))
            assert sum(one() is not None for one in produced) <= 2, "the loop may still hold the previous tensor"
            yield str(number), tensor

    write(tmp_path / "x.safetensors", produce(), [str(n) for n in range(8)])
    assert len(TensorFile(tmp_path / "x.safetensors").entries) == 8

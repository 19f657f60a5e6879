"""Safetensors files, read and written one tensor at a time to save memory."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_align.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8  # bytes of the number that holds the header's length
ENTRY_BYTES = 128  # upper bound of the bytes of a header entry without its name


@dataclass(frozen=True)
class Entry:
    """The header entry of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


class TensorFile:
    """A safetensors file. On opening, the safetensors library checks its header and its length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(LENGTH), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError) as fault:
            raise UserError(
                f"{path}: damaged or cut short ({path.stat().st_size:,} bytes): {fault}; save or download it again"
            ) from fault
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(one["dtype"], tuple(one["shape"]), LENGTH + length + one["data_offsets"][0], _size(one))
            for name, one in header.items()
        }

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read one tensor with its stored dtype.

        `into` is memory for its bytes, which a later read may overwrite. Fresh memory for every tensor of a large file
        takes longer than reading it.
        """
        entry = self.entries[name]
        buffer = torch.empty(entry.size, dtype=torch.uint8) if into is None else into[: entry.size]
        view, done = buffer.numpy().data, 0
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            while done < entry.size and (count := stream.readinto(view[done:])):  # one call reads at most 2 GiB
                done += count
        if done != entry.size:
            raise UserError(f"{self.path}: the file was truncated while it was read")
        return buffer.view(DTYPES[entry.dtype]).view(entry.shape)


def write(path: Path, tensors: Iterable[tuple[str, Tensor]], names: Collection[str]) -> None:
    """Write tensors while they are computed. `names` are the names of all tensors, to reserve space for the header."""
    header_bytes = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + ENTRY_BYTES
    header_bytes += -(LENGTH + header_bytes) % LENGTH
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    with path.open("wb") as stream:
        stream.seek(LENGTH + header_bytes)
        at = 0
        for name, tensor in tensors:
            array = tensor.contiguous().view(torch.uint8).numpy()
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + array.nbytes],
            }
            stream.write(array.data)
            at += array.nbytes
            del tensor, array  # before the next tensor is computed
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= header_bytes, "the header exceeds its reserved space"
        stream.seek(0)
        stream.write(header_bytes.to_bytes(LENGTH, "little") + text.ljust(header_bytes))


def _size(entry: dict[str, list[int]]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin

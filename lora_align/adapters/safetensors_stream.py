"""A safetensors file, read and written a tensor at a time, so that memory holds one tensor and not the file."""

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
LENGTH = 8  # bytes that say how long the header is
ROOM = 128  # more than an entry of the header takes beside its name


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """A file found whole: the library has checked that its header and its length agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(LENGTH), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError) as fault:
            raise UserError(f"{path}: damaged or cut short ({path.stat().st_size:,} bytes): {fault}") from fault
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(of["dtype"], tuple(of["shape"]), LENGTH + length + of["data_offsets"][0], _size(of))
            for name, of in header.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        entry = self.entries[name]
        held = bytearray(entry.size)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            if stream.readinto(held) != entry.size:
                raise UserError(f"{self.path}: cut short while it was read")
        return torch.frombuffer(held, dtype=DTYPES[entry.dtype]).view(entry.shape)


def write(path: Path, tensors: Iterable[tuple[str, Tensor]], names: Collection[str]) -> None:
    """Write tensors as they come; `names` are all of theirs, known beforehand so that the header gets its room."""
    room = sum(len(json.dumps(name)) + ROOM for name in names) + ROOM
    room += -(LENGTH + room) % LENGTH
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    with path.open("wb") as stream:
        stream.seek(LENGTH + room)
        at = 0
        for name, tensor in tensors:
            held = tensor.contiguous().view(torch.uint8).numpy()
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + held.nbytes],
            }
            stream.write(held.data)
            at += held.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= room, "an entry took more than its room"
        stream.seek(0)
        stream.write(room.to_bytes(LENGTH, "little") + text.ljust(room))


def _size(of: dict[str, list[int]]) -> int:
    begin, end = of["data_offsets"]
    return end - begin

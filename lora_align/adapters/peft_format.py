"""PEFT's LoRA folders, read with suspicion and a module at a time, and written so that stock PEFT loads them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from lora_align.adapters import peft_config, safetensors_stream
from lora_align.adapters.delta import Factors, LoraDelta, finite
from lora_align.adapters.peft_config import About
from lora_align.adapters.safetensors_stream import TensorFile
from lora_align.console import inert
from lora_align.errors import UserError

CONFIG, WEIGHTS = peft_config.CONFIG, peft_config.WEIGHTS
PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
Shape = tuple[int, int]  # of ΔW


class Adapter(Mapping[str, Factors]):
    """An adapter folder: found sound as far as its configuration and header tell; its tensors are read when asked for.

    Factors come in float32 at least, because in half precision the folded scaling would be rounded.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        """`whole`: a manifest has vouched for the files, so that what is not there was never there."""
        self.folder, self.config = folder, peft_config.read(folder)
        self._fits = peft_config.targeted(self.config)
        self._file = _weights(folder)
        self.shapes: dict[str, Shape] = {}
        sides: dict[str, set[str]] = {}
        for key in self._file.entries:
            match = TENSOR.fullmatch(key)
            if not match:
                raise UserError(f"{self._file.path}: {inert(key)!r} is not a LoRA tensor of a linear layer")
            sides.setdefault(match[1], set()).add(match[2])
        if not sides:
            raise UserError(f"{self._file.path}: no LoRA tensors in it")
        for name, found in sides.items():
            if found != {"A", "B"}:
                raise UserError(f"{self._file.path}: {inert(name)} has lora_{min(found)} but not the other side")
            self.shapes[name] = self._shape(name)
        lacking = "" if whole else peft_config.lacking(self.config, self.shapes)
        if lacking:
            raise UserError(f"{self._file.path}: {inert(lacking)}; tensors are missing")

    @property
    def base(self) -> str:
        """The name its configuration gives the base; it may give none."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in; of several, the one that holds them all."""
        found = {safetensors_stream.DTYPES[entry.dtype] for entry in self._file.entries.values()}
        return reduce(torch.promote_types, found)

    def __getitem__(self, name: str) -> Factors:
        if name not in self.shapes:
            raise KeyError(name)
        A, B = (self._file.read(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        factors = Factors(B.to(dtype) * peft_config.scaling(self.config, name), A.to(dtype))
        if not (finite(factors.B) and finite(factors.A)):
            raise UserError(f"{self._file.path}: {inert(name)} holds values that are not finite, or not once scaled")
        return factors

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _shape(self, name: str) -> Shape:
        """ΔW's shape, after both sides were found to have the configured rank."""
        A, B = (self._file.entries[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        rank = peft_config.rank(self.config, name)
        if A.dtype not in safetensors_stream.DTYPES or B.dtype not in safetensors_stream.DTYPES:
            raise UserError(
                f"{self._file.path}: {inert(name)} is stored as {A.dtype}, {B.dtype}, not as numbers to add"
            )
        if not (len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] == rank and A.size and B.size):
            raise UserError(f"{self.folder}: {inert(name)} has tensors {B.shape}, {A.shape}; the rank is {rank}")
        if not self._fits(name):
            raise UserError(f"{self._file.path}: {inert(name)} is not among the target_modules; PEFT would not load it")
        return B.shape[0], A.shape[1]


def load(folder: Path, whole: bool = False) -> LoraDelta:
    """The update an adapter folder describes."""
    return LoraDelta.of(Adapter(folder, whole))


def save(
    folder: Path,
    modules: Iterable[tuple[str, Factors]],
    names: Collection[str],
    about: About,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an ordinary PEFT adapter whose scaling is 1, as its modules come; `names` are all of theirs."""
    ranks: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, factors in modules:
            ranks[name] = factors.rank
            held = factors.balanced() if dtype == torch.float16 else factors
            for side, tensor in (("A", held.A), ("B", held.B)):
                stored = tensor.to(dtype)
                if not finite(stored):
                    short = str(dtype).removeprefix("torch.")
                    remedy = "smaller weights" if dtype == torch.float32 else "smaller weights or --dtype float32"
                    raise UserError(f"{inert(name)}: a value is too large for {short}; give {remedy}")
                yield f"{PREFIX}{name}.lora_{side}.weight", stored

    folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{PREFIX}{name}.lora_{side}.weight" for name in names for side in "AB"]
    safetensors_stream.write(folder / WEIGHTS, tensors(), keys)
    (folder / CONFIG).write_text(peft_config.written(ranks, about), encoding="utf-8")


def _weights(folder: Path) -> TensorFile:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = next(folder.glob("adapter_model.bin"), None)
        hint = f"; {pickled.name} is a pickle and is not opened: save it as safetensors with PEFT" if pickled else ""
        raise UserError(f"no {WEIGHTS} in {folder}{hint}")
    return TensorFile(path)

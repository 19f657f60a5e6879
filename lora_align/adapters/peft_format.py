"""PEFT's LoRA folders: read with checks and one module at a time; written so that stock PEFT loads them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from lora_align.adapters import peft_config, safetensors_stream
from lora_align.adapters.delta import Factors, LoraDelta, is_finite
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.safetensors_stream import TensorFile
from lora_align.errors import UserError

CONFIG, WEIGHTS = peft_config.CONFIG, peft_config.WEIGHTS
PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
Shape = tuple[int, int]  # shape of ΔW


class Adapter(Mapping[str, Factors]):
    """An adapter folder. Configuration and header are checked at once; tensors are read on access.

    Factors have at least float32, because half precision would round the folded scaling.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        """Open an adapter. With `whole`, a manifest has verified the files, so missing tensors are not searched for."""
        self.folder, self.config = folder, peft_config.read(folder)
        self._is_target = peft_config.target_matcher(self.config)
        self._file = _weights(folder)
        self.shapes: dict[str, Shape] = {}
        sides: dict[str, set[str]] = {}
        for key in self._file.entries:
            match = TENSOR.fullmatch(key)
            if not match:
                raise UserError(f"{self._file.path}: {key!r} is not a LoRA tensor of a linear layer")
            sides.setdefault(match[1], set()).add(match[2])
        if not sides:
            raise UserError(f"{self._file.path}: the file has no LoRA tensors")
        for name, factors in sides.items():
            if factors != {"A", "B"}:
                raise UserError(f"{self._file.path}: {name} has lora_{min(factors)} but not the other factor")
            self.shapes[name] = self._shape(name)
        missing = "" if whole else peft_config.missing_module(self.config, self.shapes)
        if missing:
            raise UserError(f"{self._file.path}: {missing}; tensors are missing: save or download the adapter again")

    @property
    def base(self) -> str:
        """Return the base's name in the configuration; "" if it has none."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype; if there are several, the smallest one that can represent all of them."""
        dtypes = {safetensors_stream.DTYPES[entry.dtype] for entry in self._file.entries.values()}
        return reduce(torch.promote_types, dtypes)

    def __getitem__(self, name: str) -> Factors:
        if name not in self.shapes:
            raise KeyError(name)
        A, B = (self._file.read(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        factors = Factors(B.to(dtype) * peft_config.scaling(self.config, name), A.to(dtype))
        if not (is_finite(factors.B) and is_finite(factors.A)):
            raise UserError(f"{self._file.path}: {name} has values that are not finite, or overflow when scaled")
        return factors

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _shape(self, name: str) -> Shape:
        """Check a module's tensors against the configuration and return the shape of ΔW."""
        A, B = (self._file.entries[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        rank = peft_config.rank(self.config, name)
        if A.dtype not in safetensors_stream.DTYPES or B.dtype not in safetensors_stream.DTYPES:
            raise UserError(
                f"{self._file.path}: {name} is stored as {A.dtype}, {B.dtype}; "
                f"expected {', '.join(safetensors_stream.DTYPES)}"
            )
        if not (len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] == rank and A.size and B.size):
            raise UserError(
                f"{self.folder}: {name}: lora_B is {B.shape} and lora_A {A.shape}, but {CONFIG} says rank {rank}"
            )
        if not self._is_target(name):
            raise UserError(f"{self._file.path}: {name} is not among the target_modules; PEFT would not load it")
        return B.shape[0], A.shape[1]


def load(folder: Path, whole: bool = False) -> LoraDelta:
    """Return the update of an adapter folder."""
    return LoraDelta.of(Adapter(folder, whole))


def save(
    folder: Path,
    modules: Iterable[tuple[str, Factors]],
    names: Collection[str],
    about: BaseInfo,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a plain PEFT adapter with a scaling of 1 while `modules` are computed. `names` lists all modules."""
    ranks: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, factors in modules:
            ranks[name] = factors.rank
            balanced = factors.balanced() if dtype == torch.float16 else factors
            for side, tensor in (("A", balanced.A), ("B", balanced.B)):
                stored = tensor.to(dtype)
                if not is_finite(stored):
                    short = str(dtype).removeprefix("torch.")
                    remedy = "smaller weights" if dtype == torch.float32 else "smaller weights or --dtype float32"
                    raise UserError(f"{name}: a value is too large for {short}; give {remedy}")
                yield f"{PREFIX}{name}.lora_{side}.weight", stored

    folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{PREFIX}{name}.lora_{side}.weight" for name in names for side in "AB"]
    safetensors_stream.write(folder / WEIGHTS, tensors(), keys)
    (folder / CONFIG).write_text(peft_config.to_json(ranks, about), encoding="utf-8")


def _weights(folder: Path) -> TensorFile:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = next(folder.glob("adapter_model.bin"), None)
        hint = f"; {pickled.name} is an unsafe pickle, so save it as safetensors with PEFT" if pickled else ""
        raise UserError(f"no {WEIGHTS} in {folder}{hint}")
    return TensorFile(path)

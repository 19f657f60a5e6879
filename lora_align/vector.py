"""The class `Vector` of the Python API: weighted sums of adapters, to add, subtract, compare and save."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from lora_align import runs, store
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.policy.policy import Policy, one_adapter
from lora_align.recipe import Base, Recipe

if TYPE_CHECKING:
    from lora_align.adapters.delta import LoraDelta

SAME = 1e-6  # relative difference up to which two updates count as equal, because of rounding
QUIET = Screen(quiet=True)


class Vector:
    """A weighted sum of preference vectors or adapters, by name.

    `+`, `-`, `*`, `/` and `sum` are exact: they combine weights, without loading a tensor. `==` loads and compares the
    updates.
    """

    def __init__(self, weights: Mapping[str, float], named: Mapping[str, vectors.Vector], recipe: Recipe, runs: Path):
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self._vectors, self._recipe, self._runs = {name: named[name] for name in self.weights}, recipe, runs

    @property
    def name(self) -> str:
        """Return the terms of the sum, such as `helpful` or `helpful=1,harmless=-0.5`."""
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights))
        return ",".join(f"{name}={weight:g}" for name, weight in self.weights.items()) or "0"

    @property
    def policy(self) -> Policy:
        """Return the start policy plus this vector, or the base plus a vector that contains the start adapter."""
        if list(self.weights.values()) == [1.0]:
            return one_adapter(self._vectors[self.name])
        vectors.refuse_start_inside(self._vectors.values())
        return Policy(self.name, self._vectors, self.weights)

    @cached_property
    def delta(self) -> LoraDelta:
        """Return the factors B and A of every module, loaded on first use."""
        from lora_align.adapters.delta import LoraDelta, total

        loaded, _ = vectors.load_updates(self.policy.vectors)
        return total([LoraDelta(()), *(loaded[name] * weight for name, weight in self.weights.items())])

    @property
    def rank(self) -> int:
        """Return the largest rank of a module."""
        return self.delta.rank

    @property
    def norm(self) -> float:
        """Return the Frobenius norm over all modules."""
        return self.delta.norm()

    @property
    def unconverged(self) -> list[str]:
        """Return the reasons why runs of this vector are unconverged; empty if none is known."""
        return [reason for vector in self._vectors.values() for reason in vector.unconverged()]

    def inner(self, other: Vector) -> float:
        """Return the inner product of two updates, module by module."""
        return self.delta.inner(other.delta)

    def cosine(self, other: Vector) -> float:
        """Return the cosine of the angle between two updates; nan if one of them is zero."""
        return self.delta.cosine(other.delta)

    def save(
        self, folder: str | Path, *, rank: int | None = None, keep: float | None = None, dtype: str | None = None
    ) -> Path:
        """Write an ordinary PEFT adapter. It contains the SFT adapter of the start policy, if there is one.

        `rank` truncates the vector. `keep` truncates it to the smallest rank with this share of the energy."""
        from lora_align.adapters.merge_options import MergeOptions
        from lora_align.commands.merge import merge_adapters

        if not self.weights:
            raise UserError("this vector is zero: there is nothing to save")
        how = MergeOptions(rank=rank, keep=keep, dtype=dtype)
        out = Path(folder)
        mix = merge_adapters(self.weights, self._recipe, self._runs, QUIET, how, out=out, by_name=self._vectors)
        return mix.run.path

    def compress(self, folder: str | Path | None = None, *, keep: float = 0.99) -> Vector:
        """Save at the smallest rank with this share of the energy, and load the saved adapter.

        Without a folder, the adapter is saved in the cache folder, and found there if it was saved before.
        """
        if folder is None:
            parts = [[weight, self._vectors[name].lineage()] for name, weight in self.weights.items()]
            key = hashlib.sha256(json.dumps([keep, parts]).encode()).hexdigest()[:32]
            folder = store.cache_folder() / "compressed" / key
            if runs.is_run(folder):
                return load(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
        return load(self.save(folder, keep=keep))

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        names = dict.fromkeys((*self.weights, *other.weights))
        weights = {name: self.weights.get(name, 0.0) + other.weights.get(name, 0.0) for name in names}
        for name in self.weights.keys() & other.weights.keys():
            if self._vectors[name].lineage() != other._vectors[name].lineage():
                raise UserError(f"two different adapters are both named {name!r}: load one of them by its folder")
        owner = self if self._recipe.base.model else other  # a loaded folder has no recipe
        return Vector(weights, {**other._vectors, **self._vectors}, owner._recipe, owner._runs)

    @overload
    def __radd__(self, other: int) -> Vector: ...
    @overload
    def __radd__(self, other: Vector) -> Vector: ...
    def __radd__(self, other: int | Vector) -> Vector:
        """Support `sum`, which begins with 0."""
        return self if other == 0 else NotImplemented

    def __mul__(self, weight: float) -> Vector:
        scaled = {name: own * weight for name, own in self.weights.items()}
        return Vector(scaled, self._vectors, self._recipe, self._runs)

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Vector:
        return self * (1 / weight)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __sub__(self, other: Vector) -> Vector:
        return self + -other

    def __eq__(self, other: object) -> bool:
        """Compare the updates, whatever their terms are called."""
        if not isinstance(other, Vector):
            return NotImplemented
        if self.weights == other.weights and self._vectors == other._vectors:
            return True
        difference = (self.delta - other.delta).norm()
        return difference <= SAME * max(self.norm, other.norm)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        judged = all(vector.judged() for vector in self._vectors.values())
        unconverged = "yes" if self.unconverged else "no" if judged else "unknown"
        return f"{self.name}: rank {self.rank}, norm {self.norm:.3f}, unconverged: {unconverged}"


def load(folder: str | Path) -> Vector:
    """Load any PEFT LoRA folder as a vector."""
    path = Path(folder).expanduser()
    vector = vectors.from_folder(path, str(path))
    recipe = Recipe(base=Base(""))
    return Vector({vector.name: 1.0}, {vector.name: vector}, recipe, path.parent)

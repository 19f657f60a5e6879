"""A LoRA as a value: module → (B, A) with ΔW = B @ A, scaling folded into B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # a share of the largest singular value that cannot be told from 0


@dataclass(frozen=True)
class Factors:
    """One module's update: B [out, r] and A [r, in]."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.A.shape[0]

    def scaled(self, weight: float) -> Factors:
        """One side alone is scaled: scaling both would square the weight."""
        return self if weight == 1.0 else Factors(self.B * weight, self.A)

    def inner(self, other: Factors) -> float:
        """⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ), in float64 and without forming either product."""
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float((left * right).sum())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, k], σ [k], Vᵀ [k, in] of the product in float64: QR of both sides, then SVD of the small core."""
        Q_out, R_out = torch.linalg.qr(self.B.double())
        Q_in, R_in = torch.linalg.qr(self.A.double().T)
        U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
        return Q_out @ U, S, Vt @ Q_in.T

    def truncated(self, rank: int) -> Factors:
        """The nearest product of that rank (Eckart-Young)."""
        if self.rank <= rank:
            return self
        U, S, Vt = self.svd()
        root = S[:rank].sqrt()
        B, A = U[:, :rank] * root, Vt[:rank] * root[:, None]
        return Factors(B.to(self.B.dtype), A.to(self.A.dtype))

    def padded(self, rank: int) -> Factors:
        """The same product with columns and rows of zeros up to that rank."""
        if rank <= self.rank:
            return self
        more = rank - self.rank
        return Factors(nn.functional.pad(self.B, (0, more)), nn.functional.pad(self.A, (0, 0, 0, more)))


def stacked(parts: Sequence[Factors]) -> Factors:
    """[B B' …] [A; A'; …] = BA + B'A' + …, exactly."""
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([part.B for part in parts], dim=1), torch.cat([part.A for part in parts]))


Modules = Mapping[str, Factors]  # in memory, or a file's, read when they are asked for


@dataclass(frozen=True, eq=False)
class LoraDelta(Mapping[str, Factors]):
    """An immutable weighted sum of low-rank updates. `+ - *` are exact and only note what is to be done.

    A module's factors are stacked when they are asked for: a sum of files takes the memory of one module, not of them
    all, and an update that occurs twice is there once, with the sum of its weights.
    """

    terms: tuple[tuple[Modules, float], ...]

    @classmethod
    def of(cls, modules: Modules) -> LoraDelta:
        """One update as it is."""
        return cls(((modules, 1.0),))

    @cached_property
    def _names(self) -> dict[str, None]:
        return {name: None for modules, _ in self.terms for name in modules}

    def __getitem__(self, name: str) -> Factors:
        parts = [modules[name].scaled(weight) for modules, weight in self.terms if name in modules]
        if not parts:
            raise KeyError(name)
        return stacked(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __add__(self, other: LoraDelta) -> LoraDelta:
        terms = list(self.terms)
        for modules, weight in other.terms:
            at = next((i for i, (known, _) in enumerate(terms) if known is modules), None)
            if at is None:
                terms.append((modules, weight))
            else:
                terms[at] = (modules, terms[at][1] + weight)
        return LoraDelta(tuple(terms))

    def __mul__(self, weight: float) -> LoraDelta:
        return LoraDelta(tuple((modules, own * weight) for modules, own in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> LoraDelta:
        return self * -1.0

    def __sub__(self, other: LoraDelta) -> LoraDelta:
        return self + -other

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((f.rank for f in self.values()), default=0)

    def inner(self, other: LoraDelta) -> float:
        """The sum of the modules' inner products; a module missing on one side counts nothing."""
        return sum(self[name].inner(other[name]) for name in self if name in other)

    def norm(self) -> float:
        """Frobenius norm over all modules. Rounding can leave a tiny negative square."""
        return math.sqrt(max(self.inner(self), 0.0))

    def cosine(self, other: LoraDelta) -> float:
        """The angle's cosine; nan where either is zero."""
        length = self.norm() * other.norm()
        return self.inner(other) / length if length else math.nan

    def truncated(self, rank: int) -> LoraDelta:
        """Every module cut to that rank, each as near as a product of that rank can be."""
        return LoraDelta.of({name: factors.truncated(rank) for name, factors in self.items()})


def total(deltas: Sequence[LoraDelta]) -> LoraDelta:
    """The sum of one or more."""
    return reduce(add, deltas)


def rank_keeping(share: float, squares: Sequence[Tensor], energy: float) -> int:
    """The smallest rank for all modules that keeps a share of the energy, from each one's squared singular values."""
    longest = max(map(len, squares))
    together = torch.stack([nn.functional.pad(one, (0, longest - len(one))) for one in squares]).sum(0)
    enough = (together.cumsum(0) >= share * energy * (1 - 1e-9)).nonzero()
    return int(enough[0]) + 1 if len(enough) else longest

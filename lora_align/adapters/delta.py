"""A LoRA as a value: module → (B, A) with ΔW = B @ A, scaling folded into B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One module's update: B [out, r] and A [r, in]."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.A.shape[0]

    def inner(self, other: Factors) -> float:
        """⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ), in float64 and without forming either product."""
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float((left * right).sum())

    def stacked(self, other: Factors) -> Factors:
        """[B B'] [A; A'] = BA + B'A', exactly."""
        return Factors(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A], dim=0))

    def truncated(self, rank: int) -> Factors:
        """The nearest product of that rank (Eckart-Young), by QR of both sides and SVD of the small core."""
        if self.rank <= rank:
            return self
        Q_out, R_out = torch.linalg.qr(self.B.double())
        Q_in, R_in = torch.linalg.qr(self.A.double().T)
        U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
        root = S[:rank].sqrt()
        B, A = (Q_out @ U[:, :rank]) * root, (Vt[:rank] @ Q_in.T) * root[:, None]
        return Factors(B.to(self.B.dtype), A.to(self.A.dtype))


@dataclass(frozen=True)
class LoraDelta(Mapping[str, Factors]):
    """An immutable sum of low-rank updates; `+ - *` are exact and grow the rank."""

    modules: Mapping[str, Factors]

    def __getitem__(self, name: str) -> Factors:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __add__(self, other: LoraDelta) -> LoraDelta:
        both = {n: f.stacked(other[n]) if n in other else f for n, f in self.items()}
        return LoraDelta({**both, **{n: f for n, f in other.items() if n not in self}})

    def __mul__(self, weight: float) -> LoraDelta:
        return LoraDelta({n: Factors(f.B * weight, f.A) for n, f in self.items()})

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
        return sum(f.inner(other[n]) for n, f in self.items() if n in other)

    def norm(self) -> float:
        """Frobenius norm over all modules. Rounding can leave a tiny negative square."""
        return math.sqrt(max(self.inner(self), 0.0))

    def cosine(self, other: LoraDelta) -> float:
        """The angle's cosine; nan where either is zero."""
        length = self.norm() * other.norm()
        return self.inner(other) / length if length else math.nan

    def truncated(self, rank: int) -> LoraDelta:
        """Every module cut to that rank, each as near as a product of that rank can be."""
        return LoraDelta({n: f.truncated(rank) for n, f in self.items()})

    def left_out(self, whole: LoraDelta) -> float:
        """The share of `whole`'s energy that this approximation of it lacks: ‖whole − self‖² / ‖whole‖²."""
        energy = whole.inner(whole)
        return max((whole - self).inner(whole - self), 0.0) / energy if energy else 0.0


def total(deltas: list[LoraDelta]) -> LoraDelta:
    """The sum of one or more."""
    return reduce(add, deltas)

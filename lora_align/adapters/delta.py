"""A LoRA as a value: module → (B, A) with ΔW = B @ A, scaling folded into B."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # a share of the largest singular value that cannot be told from 0
CONDITION = 1e-8  # of a Gram matrix in float64, above which it will do
WHOLE = 2**31  # more than any rank


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

    @property
    def energy(self) -> float:
        """‖BA‖²; rounding can leave a tiny negative one, which is 0."""
        B, A = self.B.double(), self.A.double()
        return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)

    def svd(self, keep: int = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, k], all of σ, Vᵀ [k, in] of the product, of its first directions: the SVD of a small core."""
        (R_out, outputs), (R_in, inputs) = _triangular(self.B.double()), _triangular(self.A.double().T)
        U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
        return outputs(U[:, :keep]), S, inputs(Vt[:keep].T).T

    def cut(self, rank: int) -> tuple[Factors, float, float]:
        """The nearest product of that rank (Eckart-Young), this one's energy, and the part of that it lacks."""
        if self.rank <= rank:
            return self, self.energy, 0.0
        U, S, Vt = self.svd(rank)
        energies, root = S.square(), S[:rank].sqrt()
        B, A = (U * root).to(self.B.dtype), (Vt * root[:, None]).to(self.A.dtype)
        return Factors(B, A), float(energies.sum()), float(energies[rank:].sum())

    def balanced(self) -> Factors:
        """The same product, its sides alike in size but for a power of two: half precision has little room below."""
        largest = [float(side.abs().max()) for side in (self.B, self.A)]
        if not all(largest):
            return self
        shift = 2.0 ** round((math.log2(largest[1]) - math.log2(largest[0])) / 2)
        return Factors(self.B * shift, self.A / shift)

    def padded(self, rank: int) -> Factors:
        """The same product with columns and rows of zeros up to that rank."""
        if rank <= self.rank:
            return self
        more = rank - self.rank
        return Factors(nn.functional.pad(self.B, (0, more)), nn.functional.pad(self.A, (0, 0, 0, more)))


def _triangular(tall: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R of `tall` = QR, and what multiplies by Q.

    By the small Gram matrix where its condition leaves Q orthonormal to 1e-8: that reads `tall` once, and Q is never
    formed. Otherwise by Householder's reflections.
    """
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    if values[0] > CONDITION * values[-1]:
        root = values.sqrt()
        return root[:, None] * vectors.T, lambda x: tall @ (vectors / root @ x)
    Q, R = torch.linalg.qr(tall)
    return R, lambda x: Q @ x


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

    def only(self, names: Collection[str]) -> LoraDelta:
        """As far as it covers these modules."""
        return LoraDelta(tuple((_Some(modules, frozenset(names)), weight) for modules, weight in self.terms))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((f.rank for f in self.values()), default=0)

    def inner(self, other: LoraDelta) -> float:
        """The sum of the modules' inner products; a module missing on one side counts nothing."""
        return sum(self[name].inner(other[name]) for name in self if name in other)

    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.sqrt(sum(factors.energy for factors in self.values()))

    def cosine(self, other: LoraDelta) -> float:
        """The angle's cosine; nan where either is zero."""
        length = self.norm() * other.norm()
        return self.inner(other) / length if length else math.nan


@dataclass(frozen=True, eq=False)
class _Some(Mapping[str, Factors]):
    modules: Modules
    names: frozenset[str]

    def __getitem__(self, name: str) -> Factors:
        if name not in self.names:
            raise KeyError(name)
        return self.modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names and name in self.modules

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.modules if name in self.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def total(deltas: Sequence[LoraDelta]) -> LoraDelta:
    """The sum of one or more."""
    return reduce(add, deltas)


def finite(tensor: Tensor) -> bool:
    """Whether all of its values are. (`max` hands on a nan, and keeps no answer a value.)"""
    return not tensor.numel() or bool(tensor.abs().max().isfinite())


def rank_losing(at_most: float, squares: Sequence[Tensor]) -> int:
    """The smallest rank for all modules that loses no more energy, from each one's squared singular values."""
    together = nn.utils.rnn.pad_sequence(list(squares)).sum(1)
    lost = together.flip(0).cumsum(0).flip(0)[1:]  # by rank 1, by rank 2, and so on; the last loses nothing
    allowed = at_most + 1e-9 * float(together.sum())
    return int((lost > allowed).sum()) + 1

"""LoRA updates as values: module → (B, A) with ΔW = B @ A and the scaling folded into B."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # singular values below this share of the largest count as 0
CONDITION = 1e-8  # a Gram matrix replaces QR if its smallest eigenvalue is above this share of its largest
MAX_RANK = 2**31  # larger than any rank


@dataclass(frozen=True)
class Factors:
    """One module's update: B [out, r] and A [r, in]."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return self.A.shape[0]

    def scaled(self, weight: float) -> Factors:
        """Return weight · BA. Only B is scaled; scaling both sides would square the weight."""
        return self if weight == 1.0 else Factors(self.B * weight, self.A)

    def inner(self, other: Factors) -> float:
        """Return ⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ), in float64 and without forming BA or B'A'."""
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float((left * right).sum())

    @property
    def energy(self) -> float:
        """Return ‖BA‖², clamped at 0 because rounding can make it slightly negative."""
        B, A = self.B.double(), self.A.double()
        return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)

    def svd(self, keep: int = MAX_RANK) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [out, k], all r singular values, and Vᵀ [k, in] of BA, with k ≤ `keep`.

        Only an r × r core is decomposed.
        """
        (R_out, outputs), (R_in, inputs) = _qr(self.B.double()), _qr(self.A.double().T)
        U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
        return outputs(U[:, :keep]), S, inputs(Vt[:keep].T).T

    def truncate(self, rank: int) -> tuple[Factors, float, float]:
        """Return the best approximation of rank `rank` (Eckart-Young), the energy before it, and the energy lost."""
        if self.rank <= rank:
            return self, self.energy, 0.0
        U, S, Vt = self.svd(rank)
        energies, root = S.square(), S[:rank].sqrt()
        B, A = (U * root).to(self.B.dtype), (Vt * root[:, None]).to(self.A.dtype)
        return Factors(B, A), float(energies.sum()), float(energies[rank:].sum())

    def balanced(self) -> Factors:
        """Return the same product with B and A of similar size, so that float16 does not underflow.

        The factor is a power of two, which is exact.
        """
        largest = [float(side.abs().max()) for side in (self.B, self.A)]
        if not all(largest):
            return self
        shift = 2.0 ** round((math.log2(largest[1]) - math.log2(largest[0])) / 2)
        return Factors(self.B * shift, self.A / shift)

    def padded(self, rank: int) -> Factors:
        """Return the same product, padded with zeros to a rank."""
        if rank <= self.rank:
            return self
        more = rank - self.rank
        return Factors(nn.functional.pad(self.B, (0, more)), nn.functional.pad(self.A, (0, 0, 0, more)))


def _qr(tall: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return R of `tall` = QR, and a function that multiplies by Q.

    A well-conditioned Gram matrix gives both without forming Q, which is orthonormal to 1e-8. Otherwise Householder QR
    is used.
    """
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    if values[0] > CONDITION * values[-1]:
        root = values.sqrt()
        return root[:, None] * vectors.T, lambda x: tall @ (vectors / root @ x)
    Q, R = torch.linalg.qr(tall)
    return R, lambda x: Q @ x


def stacked(parts: Sequence[Factors]) -> Factors:
    """Return the exact sum of products by stacking: [B B' …] [A; A'; …] = BA + B'A' + …."""
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([part.B for part in parts], dim=1), torch.cat([part.A for part in parts]))


Modules = Mapping[str, Factors]  # in memory, or read from a file on access


@dataclass(frozen=True, eq=False)
class LoraDelta(Mapping[str, Factors]):
    """An immutable weighted sum of low-rank updates. `+ - *` are exact and lazy.

    A module's factors are stacked on access, so a sum of files takes the memory of one module. An update that occurs
    twice becomes one term with the sum of its weights.
    """

    terms: tuple[tuple[Modules, float], ...]

    @classmethod
    def of(cls, modules: Modules) -> LoraDelta:
        """Return the delta of one update with weight 1."""
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
        """Restrict the delta to some modules."""
        return LoraDelta(tuple((_Subset(modules, frozenset(names)), weight) for modules, weight in self.terms))

    @property
    def rank(self) -> int:
        """Return the largest rank of a module."""
        return max((f.rank for f in self.values()), default=0)

    def inner(self, other: LoraDelta) -> float:
        """Return the sum of the modules' inner products; a module missing on one side counts as 0."""
        return sum(self[name].inner(other[name]) for name in self if name in other)

    def norm(self) -> float:
        """Return the Frobenius norm over all modules."""
        return math.sqrt(sum(factors.energy for factors in self.values()))

    def cosine(self, other: LoraDelta) -> float:
        """Return the cosine of the angle between two deltas; nan if one is zero."""
        length = self.norm() * other.norm()
        return self.inner(other) / length if length else math.nan


@dataclass(frozen=True, eq=False)
class _Subset(Mapping[str, Factors]):
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
    """Return the sum of one or more deltas."""
    return reduce(add, deltas)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. `max` propagates nan."""
    return not tensor.numel() or bool(tensor.abs().max().isfinite())


def smallest_rank(at_most: float, squares: Sequence[Tensor]) -> int:
    """Return the smallest common rank at which all modules together lose at most `at_most` energy.

    `squares` holds each module's squared singular values.
    """
    summed = nn.utils.rnn.pad_sequence(list(squares)).sum(1)
    lost = summed.flip(0).cumsum(0).flip(0)[1:]  # energy lost at rank 1, 2, …; the full rank loses nothing
    allowed = at_most + 1e-9 * float(summed.sum())
    return int((lost > allowed).sum()) + 1

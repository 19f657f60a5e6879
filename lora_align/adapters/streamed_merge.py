"""Merge whole adapters one module at a time, so that memory holds one module: apply the method, truncate, report."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lora_align.adapters.delta import MAX_RANK, ROUNDING, Factors, LoraDelta, is_finite, smallest_rank, stacked
from lora_align.adapters.merge_methods import METHODS, Parts
from lora_align.errors import UserError

SMALL = 1024  # a dense matrix whose shorter side is at most this gets an exact SVD
OVERSAMPLED, POWERS = 8, 4  # extra columns and power iterations of the randomised SVD of larger matrices


@dataclass(frozen=True)
class MergedModule:
    """One module of the result.

    Without truncation the energy is nan, because computing it costs O(R²) for rank R, and the sum itself only O(R).
    """

    module: str
    factors: Factors
    energy: float  # before truncation
    lost: float  # energy that the truncation removed


@dataclass(frozen=True)
class Merge:
    """Vectors with weights and a merge method. Each pass over `modules` computes the result again."""

    vectors: Mapping[str, LoraDelta]
    weights: Mapping[str, float]
    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    start: LoraDelta = field(default_factory=lambda: LoraDelta(()))  # start adapter, added with weight 1

    def names(self) -> list[str]:
        """Return the modules of the start adapter and of the vectors with a weight."""
        updates = [self.start, *(self.vectors[key] for key in self._weighted())]
        return list(dict.fromkeys(name for update in updates for name in update))

    def modules(self, rank: int | None = None) -> Iterator[MergedModule]:
        """Yield the result module by module, truncated to `rank` or else to the method's default rank."""
        for name in self.names():
            yield self.module(name, rank)

    def module(self, name: str, rank: int | None = None) -> MergedModule:
        """Return the result for one module; see `modules`."""
        default_rank = METHODS[self.method].rank
        having = tuple(key for key in self._weighted() if name in self.vectors[key])
        updates = tuple(self.vectors[key][name] for key in having)
        start = [self.start[name]] if name in self.start else []
        ranks = [part.rank for part in (*updates, *start)]
        merged = self._merged(Parts(name, having, updates, tuple(self.weights[key] for key in having)), start)
        return _truncated(name, merged, rank or (default_rank(ranks) if default_rank else None))

    def cancels(self) -> bool:
        """Return whether the exact weighted sum is zero up to rounding, tested with a random input per module."""
        if not METHODS[self.method].linear:
            return False
        draw = torch.Generator().manual_seed(0)
        for name in dict.fromkeys(name for update in self.vectors.values() for name in update):
            parts = [(self.vectors[key][name], w) for key, w in self.weights.items() if name in self.vectors[key]]
            x = torch.randn(parts[0][0].A.shape[1], generator=draw, dtype=torch.float64)
            outputs = [part.B.double() @ (part.A.double() @ x) * weight for part, weight in parts]
            total = float(torch.stack(outputs).sum(0).norm())
            if not math.isfinite(total) or total > ROUNDING * sum(float(one.norm()) for one in outputs):
                return False
        return True

    def smallest_rank(self, share: float) -> int:
        """Return the smallest common rank that loses at most 1 - `share` of the vectors' energy."""
        if METHODS[self.method].dense:
            raise UserError(f"--rank auto needs a low-rank method, and {self.method} is dense; give a number")
        squares = [merged.factors.svd(0)[1].square() for merged in self.modules(MAX_RANK)]
        vectors = replace(self, start=LoraDelta(()))  # a start adapter's large energy would hide losses of the vectors
        energy = sum(merged.energy for merged in vectors.modules(MAX_RANK))
        return smallest_rank((1 - share) * energy, squares)

    def _merged(self, parts: Parts, start: list[Factors]) -> Factors | Tensor:
        if not parts.updates:
            return start[0]
        method = METHODS[self.method]
        merged: Factors | Tensor = method.function(parts, **{**method.options, **self.options})
        if isinstance(merged, Factors):
            return stacked([*start, merged])
        return reduce(torch.add, [update.B @ update.A for update in start], merged)

    def _weighted(self) -> list[str]:
        """Return the vectors with a weight other than 0; all vectors if every weight is 0."""
        return [key for key, weight in self.weights.items() if weight] or list(self.weights)


@dataclass
class Tally:
    """The rank and the energies of a merge, accumulated while its modules are written."""

    rank: int = 0
    energy: float = 0.0
    lost: float = 0.0

    def counted(self, modules: Iterable[MergedModule], padded: int = 0) -> Iterator[tuple[str, Factors]]:
        """Yield the modules, padded with zeros to rank `padded`, and update the figures."""
        for merged in modules:
            factors = merged.factors.padded(padded)
            self.rank = max(self.rank, factors.rank)
            self.energy += merged.energy
            self.lost += merged.lost
            yield merged.module, factors

    @property
    def left_out(self) -> float:
        """Return the share of the energy that truncation removed."""
        return self.lost / self.energy if self.lost else 0.0


# --- helpers ---


def _truncated(module: str, update: Factors | Tensor, rank: int | None) -> MergedModule:
    """Truncate a module's update to `rank`, which a dense matrix requires."""
    if not is_finite(update if isinstance(update, Tensor) else update.B):
        raise UserError(f"{module}: the result overflows; give smaller weights")
    if isinstance(update, Factors):
        return MergedModule(module, *update.truncate(rank)) if rank else MergedModule(module, update, math.nan, 0.0)
    assert rank, "a method that returns a matrix needs dense=True and a rank"
    energy = float(update.double().square().sum())
    U, S, Vt = _svd(update, rank)
    root, retained = S[:rank].sqrt(), float(S[:rank].double().square().sum())
    factors = Factors((U[:, :rank] * root).to(update.dtype), (Vt[:rank] * root[:, None]).to(update.dtype))
    return MergedModule(module, factors, energy, max(energy - retained, 0.0))


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ, Vᵀ of a dense matrix; for a large one, only about `rank` directions by randomised SVD."""
    if min(matrix.shape) <= max(SMALL, 2 * rank):
        U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U, S, Vt
    draw = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=draw).to(matrix)).Q
    for _ in range(POWERS):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vt

"""Merge methods: each is a pure function of one module's updates and their weights.

`merge_options.METHODS` lists the methods; keyword parameters are their options. A method returns factors if its result
has a low rank, and a dense matrix otherwise. Both are then truncated to the requested rank, and the lost energy is
reported.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lora_align.adapters.delta import MAX_RANK, ROUNDING, Factors, LoraDelta, is_finite, smallest_rank, stacked
from lora_align.adapters.merge_options import METHODS, SERVER_RANKS
from lora_align.console import inert
from lora_align.errors import UserError

SMALL = 1024  # a dense matrix whose shorter side is at most this gets an exact SVD
OVERSAMPLED, POWERS = 8, 4  # extra columns and power iterations of the randomised SVD of larger matrices


@dataclass(frozen=True)
class Parts:
    """One module's updates from every vector that has the module, with the weights."""

    module: str
    names: tuple[str, ...]
    updates: tuple[Factors, ...]
    weights: tuple[float, ...]

    def __iter__(self) -> Iterator[tuple[Factors, float]]:
        return zip(self.updates, self.weights, strict=True)

    @property
    def ranks(self) -> list[int]:
        """Return the rank of each update."""
        return [update.rank for update in self.updates]


# --- the methods ---


def exact(parts: Parts) -> Factors:
    """Return the exact weighted sum, by stacking."""
    return stacked([update.scaled(weight) for update, weight in parts])


def tsv(parts: Parts) -> Factors:
    """Orthogonalise the singular directions of all updates (TSV-Merge).

    As in the paper, each of T updates keeps 1/T of the full number of directions; low-rank updates usually have fewer
    and keep all. The method does not depend on the basis, so it runs on factors.
    """
    out, into = parts.updates[0].B.shape[0], parts.updates[0].A.shape[1]
    keep = max(min(out, into) // len(parts.updates), 1)
    left, sizes, right = [], [], []
    for update, weight in parts:
        U, S, Vt = update.svd()
        count = min(keep, int((ROUNDING * S[0] < S).sum()))  # directions of rounding errors would distort the others
        left.append(U[:, :count])
        sizes.append(S[:count] * weight)
        right.append(Vt[:count].T)
    if not any(map(len, sizes)):
        return parts.updates[0].scaled(0.0)
    B, A = _orthogonal(torch.cat(left, dim=1)) * torch.cat(sizes), _orthogonal(torch.cat(right, dim=1)).T
    return Factors(B.to(parts.updates[0].B.dtype), A.to(parts.updates[0].A.dtype))


def ties(parts: Parts, *, density: float) -> Tensor:
    """Trim each update to its largest entries, elect signs, and average the entries that agree (TIES).

    Entries are trimmed per module; the paper trims over all modules together. The result is dense.
    """
    _check_share(density, "density")

    def trimmed() -> Iterator[Tensor]:
        return (_largest(update.B @ update.A, density) * weight for update, weight in parts)

    elected = reduce(torch.add, trimmed()).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for matrix in trimmed():  # computed a second time, so that memory holds few matrices
        agrees = (matrix.sign() == elected) & (elected != 0)
        total += matrix * agrees
        agreeing += agrees
    return total / agreeing.clamp(min=1)


def dare(parts: Parts, *, drop: float, seed: int) -> Tensor:
    """Drop each entry with probability `drop` and rescale the rest by 1 / (1 - drop) (DARE). The result is dense."""
    if not 0 <= drop < 1:
        raise UserError(f"drop is {drop:g}; it must be at least 0 and below 1")

    def masked(name: str, update: Factors) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {parts.module} {name}".encode()))
        matrix = update.B @ update.A
        return matrix * (torch.rand(matrix.shape, generator=draw) >= drop)

    rescaled = (masked(name, update) * (w / (1 - drop)) for name, (update, w) in zip(parts.names, parts, strict=True))
    return reduce(torch.add, rescaled)


def server_rank(server: str, rank: int) -> int:
    """Return the smallest rank that a server accepts and that is at least `rank`."""
    if not SERVER_RANKS[server]:
        return rank
    accepted = [known for known in SERVER_RANKS[server] if known >= rank]
    if not accepted:
        raise UserError(
            f"--fit {server}: it accepts ranks up to {max(SERVER_RANKS[server])}, but this adapter has {rank}; "
            "choose a smaller one with --rank"
        )
    return accepted[0]


# --- a whole adapter, a module at a time ---


@dataclass(frozen=True)
class MergedModule:
    """One module of the result.

    Without truncation the energy is nan: computing it costs R² for rank R, while adding up costs only R.
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
        """Return every module of the start adapter and of the vectors."""
        updates = [self.start, *(self.vectors[key] for key in self._weighted())]
        return list(dict.fromkeys(name for update in updates for name in update))

    def modules(self, rank: int | None = None) -> Iterator[MergedModule]:
        """Yield the result module by module, truncated to `rank` or else to the method's default rank."""
        default_rank = METHODS[self.method].rank
        for name in self.names():
            having = tuple(key for key in self._weighted() if name in self.vectors[key])
            updates = tuple(self.vectors[key][name] for key in having)
            start = [self.start[name]] if name in self.start else []
            ranks = [part.rank for part in (*updates, *start)]
            merged = self._merged(Parts(name, having, updates, tuple(self.weights[key] for key in having)), start)
            yield _truncated(name, merged, rank or (default_rank(ranks) if default_rank else None))

    def cancels(self) -> bool:
        """Return whether the exact weighted sum is zero up to rounding, tested with a random input per module."""
        if METHODS[self.method].function != exact.__name__:
            return False
        draw = torch.Generator().manual_seed(0)
        for name in dict.fromkeys(name for update in self.vectors.values() for name in update):
            parts = [(self.vectors[key][name], w) for key, w in self.weights.items() if name in self.vectors[key]]
            x = torch.randn(parts[0][0].A.shape[1], generator=draw, dtype=torch.float64)
            outputs = [part.B.double() @ (part.A.double() @ x) * weight for part, weight in parts]
            if float(torch.stack(outputs).sum(0).norm()) > ROUNDING * sum(float(one.norm()) for one in outputs):
                return False
        return True

    def smallest_rank(self, share: float) -> int:
        """Return the smallest common rank that loses at most 1 - `share` of the vectors' energy."""
        if METHODS[self.method].dense:
            raise UserError(f"--rank auto needs a low-rank method, and {self.method} is dense; give a number")
        squares = [merged.factors.svd(0)[1].square() for merged in self.modules(MAX_RANK)]
        vectors = replace(self, start=LoraDelta(()))  # the energy of a large start would hide losses of the vectors
        energy = sum(merged.energy for merged in vectors.modules(MAX_RANK))
        return smallest_rank((1 - share) * energy, squares)

    def _merged(self, parts: Parts, start: list[Factors]) -> Factors | Tensor:
        if not parts.updates:
            return start[0]
        method = METHODS[self.method]
        merged: Factors | Tensor = globals()[method.function](parts, **{**method.options, **self.options})
        if isinstance(merged, Factors):
            return stacked([*start, merged])
        return reduce(torch.add, [update.B @ update.A for update in start], merged)

    def _weighted(self) -> list[str]:
        """Return the vectors with a weight other than 0; all vectors if every weight is 0."""
        return [key for key, weight in self.weights.items() if weight] or list(self.weights)


@dataclass
class Tally:
    """Rank and energies of a merge, summed up while its modules are written."""

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
        raise UserError(f"{inert(module)}: the result overflows; give smaller weights")
    if isinstance(update, Factors):
        return MergedModule(module, *update.cut(rank)) if rank else MergedModule(module, update, math.nan, 0.0)
    assert rank, "a dense method needs a default rank"
    energy = float(update.double().square().sum())
    U, S, Vt = _svd(update, rank)
    root, kept = S[:rank].sqrt(), float(S[:rank].double().square().sum())
    factors = Factors((U[:, :rank] * root).to(update.dtype), (Vt[:rank] * root[:, None]).to(update.dtype))
    return MergedModule(module, factors, energy, max(energy - kept, 0.0))


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


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, X (XᵀX)^(-1/2); zero directions stay zero."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    root = torch.where(values > ROUNDING**2, values.clamp(min=ROUNDING**2).rsqrt(), 0.0)
    whitened: Tensor = columns @ (vectors * root) @ vectors.T
    return whitened


def _largest(matrix: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the entries with the largest magnitude; set the others to 0."""
    entries = matrix.abs().flatten()
    drop = entries.numel() - math.ceil(density * entries.numel())
    return matrix * (matrix.abs() >= entries.kthvalue(drop + 1).values)


def _check_share(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name} is {value:g}; it must be above 0 and at most 1")

"""Ways to make one update of several, each a pure function of one module's updates and their weights.

`methods` lists them; a method's keyword parameters are its options. It returns factors where its mathematics has a
low-rank form and a dense matrix where it has none. Either is then cut to the rank asked for, and the part left out is
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

from lora_align.adapters.delta import ROUNDING, WHOLE, Factors, LoraDelta, finite, rank_losing, stacked
from lora_align.adapters.merge_options import FITS, METHODS
from lora_align.console import inert
from lora_align.errors import UserError

SMALL = 1024  # a dense matrix with a side no longer than this is decomposed exactly
OVERSAMPLED, POWERS = 8, 4  # of the randomised SVD of larger ones


@dataclass(frozen=True)
class Parts:
    """One module of every vector that has it, with the vectors' weights."""

    module: str
    names: tuple[str, ...]
    updates: tuple[Factors, ...]
    weights: tuple[float, ...]

    def __iter__(self) -> Iterator[tuple[Factors, float]]:
        return zip(self.updates, self.weights, strict=True)

    @property
    def ranks(self) -> list[int]:
        """One an update."""
        return [update.rank for update in self.updates]


# --- the methods ---


def exact(parts: Parts) -> Factors:
    """The sum itself, by stacking."""
    return stacked([update.scaled(weight) for update, weight in parts])


def tsv(parts: Parts) -> Factors:
    """Singular directions of all updates, made orthogonal to each other.

    As the paper does, each of T updates keeps 1/T of the directions a matrix of that shape can have; low-rank ones have
    fewer, and keep all. Runs on factors: nothing in it depends on the basis.
    """
    out, into = parts.updates[0].B.shape[0], parts.updates[0].A.shape[1]
    keep = max(min(out, into) // len(parts.updates), 1)
    left, sizes, right = [], [], []
    for update, weight in parts:
        U, S, Vt = update.svd()
        real = min(keep, int((ROUNDING * S[0] < S).sum()))  # others point anywhere, and room would be made for them
        left.append(U[:, :real])
        sizes.append(S[:real] * weight)
        right.append(Vt[:real].T)
    if not any(map(len, sizes)):
        return parts.updates[0].scaled(0.0)
    B, A = _orthogonal(torch.cat(left, dim=1)) * torch.cat(sizes), _orthogonal(torch.cat(right, dim=1)).T
    return Factors(B.to(parts.updates[0].B.dtype), A.to(parts.updates[0].A.dtype))


def ties(parts: Parts, *, density: float) -> Tensor:
    """Each update's largest entries; of each entry the mean of those with the elected sign.

    The largest of each module: the paper takes them over all modules together. An entry means something in the layer's
    own basis alone, so that this is dense.
    """
    _between(density, "density")

    def trimmed() -> Iterator[Tensor]:
        return (_largest(update.B @ update.A, density) * weight for update, weight in parts)

    elected = reduce(torch.add, trimmed()).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for matrix in trimmed():  # made again: memory holds a few matrices, however many updates there are
        agrees = (matrix.sign() == elected) & (elected != 0)
        total += matrix * agrees
        agreeing += agrees
    return total / agreeing.clamp(min=1)


def dare(parts: Parts, *, drop: float, seed: int) -> Tensor:
    """Each entry dropped with a probability, the rest made larger in return. Dense: what is dropped are entries."""
    if not 0 <= drop < 1:
        raise UserError(f"drop is at least 0 and below 1; it is {drop:g}")

    def kept(name: str, update: Factors) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {parts.module} {name}".encode()))
        matrix = update.B @ update.A
        return matrix * (torch.rand(matrix.shape, generator=draw) >= drop)

    thinned = (kept(name, update) * (w / (1 - drop)) for name, (update, w) in zip(parts.names, parts, strict=True))
    return reduce(torch.add, thinned)


def fitting(server: str, rank: int) -> int:
    """The smallest rank a server takes that is no smaller than this."""
    if not FITS[server]:
        return rank
    taken = [known for known in FITS[server] if known >= rank]
    if not taken:
        raise UserError(
            f"--fit {server}: it takes ranks up to {max(FITS[server])}, this adapter has {rank}; give --rank"
        )
    return taken[0]


# --- a whole adapter, a module at a time ---


@dataclass(frozen=True)
class Merged:
    """One module of the result, its energy before it was cut, and the part of that the cut left out.

    Where nothing was to be cut the energy is nan: of a rank R it costs R² to know, and adding up costs R.
    """

    module: str
    factors: Factors
    energy: float
    lost: float


@dataclass(frozen=True)
class Merge:
    """What is merged, and how. Holds no tensors; each pass over it makes them anew."""

    vectors: Mapping[str, LoraDelta]
    weights: Mapping[str, float]
    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    start: LoraDelta = field(default_factory=lambda: LoraDelta(()))  # lies under the result as it is

    def names(self) -> list[str]:
        """Every module that the start or some vector has."""
        everything = [self.start, *(self.vectors[key] for key in self._counted())]
        return list(dict.fromkeys(name for update in everything for name in update))

    def modules(self, rank: int | None = None) -> Iterator[Merged]:
        """The result, cut to the rank asked for, or to its method's."""
        own = METHODS[self.method].rank
        for name in self.names():
            having = tuple(key for key in self._counted() if name in self.vectors[key])
            updates = tuple(self.vectors[key][name] for key in having)
            below = [self.start[name]] if name in self.start else []
            ranks = [part.rank for part in (*updates, *below)]
            merged = self._merged(Parts(name, having, updates, tuple(self.weights[key] for key in having)), below)
            yield _cut(name, merged, rank or (own(ranks) if own else None))

    def cancels(self) -> bool:
        """Whether the weighted sum is zero but for rounding, by what it makes of one random input of each module."""
        if METHODS[self.method].function != exact.__name__:
            return False
        draw = torch.Generator().manual_seed(0)
        for name in dict.fromkeys(name for update in self.vectors.values() for name in update):
            parts = [(self.vectors[key][name], w) for key, w in self.weights.items() if name in self.vectors[key]]
            seen = torch.randn(parts[0][0].A.shape[1], generator=draw, dtype=torch.float64)
            made = [part.B.double() @ (part.A.double() @ seen) * weight for part, weight in parts]
            if float(torch.stack(made).sum(0).norm()) > ROUNDING * sum(float(one.norm()) for one in made):
                return False
        return True

    def smallest_rank(self, share: float) -> int:
        """The smallest rank for all modules that loses no more than the rest of this share of the vectors' energy."""
        if METHODS[self.method].dense:
            raise UserError(
                f"--rank auto goes with methods that have a low rank, not with {self.method}: give a number"
            )
        squares = [merged.factors.svd(0)[1].square() for merged in self.modules(WHOLE)]
        vectors = replace(self, start=LoraDelta(()))  # a large start must not hide what is lost of them
        energy = sum(merged.energy for merged in vectors.modules(WHOLE))
        return rank_losing((1 - share) * energy, squares)

    def _merged(self, parts: Parts, below: list[Factors]) -> Factors | Tensor:
        if not parts.updates:
            return below[0]
        method = METHODS[self.method]
        merged: Factors | Tensor = globals()[method.function](parts, **{**method.options, **self.options})
        if isinstance(merged, Factors):
            return stacked([*below, merged])
        return reduce(torch.add, [update.B @ update.A for update in below], merged)

    def _counted(self) -> list[str]:
        """What weighs 0 has no say in any method, unless everything does."""
        return [key for key, weight in self.weights.items() if weight] or list(self.weights)


@dataclass
class Tally:
    """What is told of a result after it went by."""

    rank: int = 0
    energy: float = 0.0
    lost: float = 0.0

    def counted(self, modules: Iterable[Merged], padded: int = 0) -> Iterator[tuple[str, Factors]]:
        """Count modules as they pass, and pad them with zeros to a rank."""
        for merged in modules:
            factors = merged.factors.padded(padded)
            self.rank = max(self.rank, factors.rank)
            self.energy += merged.energy
            self.lost += merged.lost
            yield merged.module, factors

    @property
    def left_out(self) -> float:
        """The share of the energy that the cut left out."""
        return self.lost / self.energy if self.lost else 0.0


# --- what they share ---


def _cut(module: str, whole: Factors | Tensor, rank: int | None) -> Merged:
    """The nearest factors of that rank, and what is lost by them; a dense matrix has to be given one."""
    if not finite(whole if isinstance(whole, Tensor) else whole.B):
        raise UserError(f"{inert(module)}: the weights are too large for its numbers")
    if isinstance(whole, Factors):
        return Merged(module, *whole.cut(rank)) if rank else Merged(module, whole, math.nan, 0.0)
    assert rank, "a dense method has a rank of its own"
    energy = float(whole.double().square().sum())
    U, S, Vt = _decomposed(whole, rank)
    root, kept = S[:rank].sqrt(), float(S[:rank].double().square().sum())
    factors = Factors((U[:, :rank] * root).to(whole.dtype), (Vt[:rank] * root[:, None]).to(whole.dtype))
    return Merged(module, factors, energy, max(energy - kept, 0.0))


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of a dense matrix: all, or of a large one somewhat more than `rank`, by random projection."""
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
    """The nearest matrix with orthonormal columns, X (XᵀX)^(-1/2); what is 0 stays 0."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    root = torch.where(values > ROUNDING**2, values.clamp(min=ROUNDING**2).rsqrt(), 0.0)
    whitened: Tensor = columns @ (vectors * root) @ vectors.T
    return whitened


def _largest(matrix: Tensor, density: float) -> Tensor:
    """All but that share of the entries, by magnitude, set to 0."""
    entries = matrix.abs().flatten()
    drop = entries.numel() - math.ceil(density * entries.numel())
    return matrix * (matrix.abs() >= entries.kthvalue(drop + 1).values)


def _between(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name} lies above 0 and is at most 1; it is {value:g}")

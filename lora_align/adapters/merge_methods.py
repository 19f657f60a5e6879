"""Merge methods: each is a pure function of one module's updates and their weights, and a row of METHODS.

Keyword parameters of a function are the method's options. A function returns factors if its result has a low rank, and
a dense matrix otherwise. Both are then truncated to the requested rank, and the lost energy is reported. The functions
import torch, and this file does not, so that `merge --help` and the refusal of a wrong option are fast.
"""

from __future__ import annotations

import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from lora_align.errors import UserError
from lora_align.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lora_align.adapters.delta import Factors


@dataclass(frozen=True)
class Method:
    """A merge method: its function, its paper, and properties of its result."""

    function: Callable[..., Factors | Tensor]  # takes Parts, and options as keyword parameters with defaults
    title: str = ""  # the paper's short name, as --help shows it
    paper: str = ""  # the paper's address
    linear: bool = False  # the result is the weighted sum, before truncation
    dense: bool = False  # the result is a matrix, not factors; such a method needs a default `rank`
    of_policies: bool = False  # weights apply to the `pos` adapters instead of the vectors pos - neg
    rank: Callable[[Iterable[int]], int] | None = None  # default rank, from the ranks of the merged updates

    @property
    def options(self) -> dict[str, Any]:
        """Return the options with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """Return what the function returns: the first sentence of its docstring, without the verb."""
        return re.split(r"\.(?:\s|$)", inspect.getdoc(self.function) or "")[0].removeprefix("Return ")


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
    """Return the weighted sum, by stacking."""
    from lora_align.adapters.delta import stacked

    return stacked([update.scaled(weight) for update, weight in parts])


def svd(parts: Parts) -> Factors:
    """Return the weighted sum, truncated to the largest rank of its parts."""
    return exact(parts)


def soup(parts: Parts) -> Factors:
    """Return the weighted mean of `pos` adapters; the weights add up to 1."""
    return exact(parts)


def tsv(parts: Parts) -> Factors:
    """Return the weighted sum with the singular directions of all updates made orthogonal (TSV-Merge).

    As in the paper, each of T updates keeps 1/T of the full number of directions; low-rank updates usually have fewer
    and keep all. The method does not depend on the basis, so it runs on factors.
    """
    import torch

    from lora_align.adapters.delta import ROUNDING, Factors

    out, into = parts.updates[0].B.shape[0], parts.updates[0].A.shape[1]
    keep = max(min(out, into) // len(parts.updates), 1)
    left, sizes, right = [], [], []
    for update, weight in parts:
        U, S, Vt = update.svd()
        # directions that are rounding errors would distort the others
        count = min(keep, int((ROUNDING * S[0] < S).sum()))
        left.append(U[:, :count])
        sizes.append(S[:count] * weight)
        right.append(Vt[:count].T)
    if not any(map(len, sizes)):
        return parts.updates[0].scaled(0.0)
    B, A = _orthogonal(torch.cat(left, dim=1)) * torch.cat(sizes), _orthogonal(torch.cat(right, dim=1)).T
    return Factors(B.to(parts.updates[0].B.dtype), A.to(parts.updates[0].A.dtype))


def ties(parts: Parts, *, density: float = 0.2) -> Tensor:
    """Return the mean, entry by entry, of the largest entries that agree with the elected sign (TIES).

    Entries are trimmed per module; the paper trims over all modules together. The result is dense.
    """
    import torch

    _check_share(density, "density")

    def trimmed() -> Iterator[Tensor]:
        return (_largest(update.B @ update.A, density) * weight for update, weight in parts)

    elected = reduce(add, trimmed()).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for matrix in trimmed():  # computed a second time, so that memory holds few matrices
        agrees = (matrix.sign() == elected) & (elected != 0)
        total += matrix * agrees
        agreeing += agrees
    return total / agreeing.clamp(min=1)


def dare(parts: Parts, *, drop: float = 0.9, seed: int = 0) -> Tensor:
    """Return the weighted sum after entries are dropped at random and the others are rescaled (DARE).

    Each entry is dropped with probability `drop`; the others are multiplied by 1 / (1 - drop). The result is dense.
    """
    import torch

    if not 0 <= drop < 1:
        raise UserError(f"drop is {drop:g}; it must be at least 0 and below 1")

    def masked(name: str, update: Factors) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {parts.module} {name}".encode()))
        matrix = update.B @ update.A
        return matrix * (torch.rand(matrix.shape, generator=draw) >= drop)

    rescaled = (masked(name, update) * (w / (1 - drop)) for name, (update, w) in zip(parts.names, parts, strict=True))
    return reduce(add, rescaled)


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, X (XᵀX)^(-1/2); zero directions stay zero."""
    import torch

    from lora_align.adapters.delta import ROUNDING

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


METHODS = Registry(
    "merge_methods",
    Method,
    {
        "exact": Method(exact, "preference vectors", "https://arxiv.org/abs/2504.20106", linear=True),
        "svd": Method(svd, "Eckart and Young", "https://doi.org/10.1007/BF02288367", linear=True, rank=max),
        "soup": Method(soup, "rewarded soups", "https://arxiv.org/abs/2306.04488", linear=True, of_policies=True),
        "tsv": Method(tsv, "task singular vectors", "https://arxiv.org/abs/2412.00081"),
        "ties": Method(ties, "TIES", "https://arxiv.org/abs/2306.01708", dense=True, rank=sum),
        "dare": Method(dare, "DARE", "https://arxiv.org/abs/2311.03099", dense=True, rank=sum),
    },
)

"""Geometry of updates: norms, angles, shared directions, spectra. Computed per module without forming ΔW."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lora_align.adapters import module_names
from lora_align.adapters.delta import ROUNDING, Factors, LoraDelta, smallest_rank, stacked

Decomposed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Geometry:
    """The inner products between several updates, per module. Each adapter is read once."""

    names: tuple[str, ...]
    grams: Mapping[str, Tensor]  # module → [n, n]

    @classmethod
    def of(cls, updates: Mapping[str, LoraDelta]) -> "Geometry":
        """Compute the geometry of named updates."""
        modules = dict.fromkeys(name for update in updates.values() for name in update)
        return cls(tuple(updates), {module: _gram(updates, module) for module in modules})

    @cached_property
    def gram(self) -> Tensor:
        """Return the Gram matrix [n, n] over all modules."""
        return torch.stack(list(self.grams.values())).sum(0)

    def norms(self) -> dict[str, float]:
        """Return each update's Frobenius norm."""
        return dict(zip(self.names, self.gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True))

    def cosines(self) -> list[list[float]]:
        """Return the matrix of cosines between the updates; nan for an update that is zero."""
        length = self.gram.diagonal().clamp(min=0).sqrt()
        return (self.gram / length[:, None] / length).clamp(-1, 1).tolist()

    def by_place(self) -> dict[str, dict[str, dict[int, float]]]:
        """Return update → kind of module → layer (-1 if the name has none) → norm over all experts."""
        squares: dict[str, dict[str, dict[int, float]]] = {name: {} for name in self.names}
        places = {module: module_names.parse_name(module) for module in self.grams}
        several = len({place.stack for place in places.values() if place}) > 1
        for module, gram in self.grams.items():
            place = places[module]
            kind = module.rpartition(".")[2] if not place else f"{place.stack} {place.kind}" if several else place.kind
            layer = place.layer if place else -1
            for name, square in zip(self.names, gram.diagonal().clamp(min=0).tolist(), strict=True):
                layers = squares[name].setdefault(kind, {})
                layers[layer] = layers.get(layer, 0.0) + square
        return {
            name: {kind: {layer: math.sqrt(x) for layer, x in layers.items()} for kind, layers in kinds.items()}
            for name, kinds in squares.items()
        }

    def coefficients(self, whole: str) -> dict[str, float]:
        """Return the weights with which the other updates best approximate `whole` (least squares)."""
        target = self.names.index(whole)
        others = [i for i in range(len(self.names)) if i != target]
        between, with_target = self.gram[others][:, others], self.gram[others, target][:, None]
        weights = torch.linalg.lstsq(between, with_target, driver="gelsd").solution[:, 0].tolist()
        return dict(zip((self.names[i] for i in others), weights, strict=True))


@dataclass(frozen=True)
class Spectrum:
    """A summary of an update's singular values over all modules."""

    rank: int  # largest rank of a module
    effective: float  # effective rank: exp of the entropy of the squared singular values, mean over modules
    for_99: int  # smallest common rank that keeps 99 % of the energy
    shares: list[float]  # share of the energy in each module's first direction, in the second, and so on


@dataclass(frozen=True)
class Interference:
    """Singular task interference, ‖(UᵀU − I) Σ (VᵀV − I)‖₁, as a mean over modules."""

    raw: float  # grows with the norms
    by_size: float  # `raw` divided by the sum of the singular values, so independent of the norms


@dataclass(frozen=True)
class Overlap:
    """The principal angles between two updates, for outputs and for inputs, as means over modules.

    `outputs` and `inputs` are mean squared cosines: 0 if no direction is shared, 1 if all are. `outputs_angle` and
    `inputs_angle` are means of the smallest angle, in degrees.
    """

    of: tuple[str, str]
    outputs: float
    outputs_angle: float
    inputs: float
    inputs_angle: float


@dataclass(frozen=True)
class Directions:
    """Statistics of the singular directions of several updates, computed per module without storing directions."""

    squares: Mapping[str, Sequence[Tensor]]  # update → each module's squared singular values
    # two updates → each module's cosines of principal angles, for outputs and for inputs
    cosines: Mapping[tuple[str, str], Sequence[tuple[Tensor, Tensor]]]
    interferences: Sequence[Interference]  # one per module

    @classmethod
    def of(cls, updates: Mapping[str, LoraDelta], rank: int) -> "Directions":
        """Compute the statistics of named updates; the interference uses `rank` directions of each update."""
        squares: dict[str, list[Tensor]] = {name: [] for name in updates}
        cosines: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {
            pair: [] for pair in itertools.combinations(updates, 2)
        }
        interferences = []
        for module in dict.fromkeys(module for update in updates.values() for module in update):
            svds = {name: _nonzero_svd(update[module]) for name, update in updates.items() if module in update}
            svds = {name: parts for name, parts in svds.items() if len(parts[1])}
            for name, (_, S, _) in svds.items():
                squares[name].append(S.square())
            for one, other in itertools.combinations(svds, 2):
                (U, _, Vt), (P, _, Qt) = svds[one], svds[other]
                angles = (torch.linalg.svdvals(U.T @ P).clamp(max=1), torch.linalg.svdvals(Vt @ Qt.T).clamp(max=1))
                cosines[one, other].append(angles)
            if svds:
                interferences.append(_interference(list(svds.values()), rank))
        return cls(squares, cosines, interferences)

    def spectrum(self, name: str) -> Spectrum:
        """Return the spectrum of one update."""
        squares = self.squares[name]
        if not squares:
            return Spectrum(0, 0.0, 0, [])
        entropies = [float(torch.special.entr(one / one.sum()).sum()) for one in squares]
        energy = float(torch.cat(list(squares)).sum())
        effective = sum(map(math.exp, entropies)) / len(entropies)
        shares = (nn.utils.rnn.pad_sequence(list(squares)).sum(1) / energy).tolist()
        return Spectrum(len(shares), effective, smallest_rank(0.01 * energy, squares), shares)

    def overlaps(self) -> list[Overlap]:
        """Return the overlap of every two updates."""
        overlaps = []
        for pair, modules in self.cosines.items():
            (outputs, outputs_angle), (inputs, inputs_angle) = (
                (
                    _mean(both[i].square().mean() for both in modules),
                    math.degrees(_mean(both[i][0].acos() for both in modules)),
                )
                for i in (0, 1)
            )
            overlaps.append(Overlap(pair, outputs, outputs_angle, inputs, inputs_angle))
        return overlaps

    def interference(self) -> Interference:
        """Return the interference between all updates (https://arxiv.org/abs/2412.00081)."""
        count = len(self.interferences) or 1
        raw, by_size = (sum(getattr(one, name) for one in self.interferences) for name in ("raw", "by_size"))
        return Interference(raw / count, by_size / count)


def _nonzero_svd(factors: Factors) -> Decomposed:
    """Return U, σ, Vᵀ without the directions that are rounding errors."""
    U, S, Vt = factors.svd()
    count = int((ROUNDING * S[0] < S).sum())
    return U[:, :count], S[:count], Vt[:count]


def _interference(updates: Sequence[Decomposed], rank: int) -> Interference:
    """Compute one module's interference from the first `rank` singular directions of each update."""
    U = torch.cat([svd[0][:, :rank] for svd in updates], 1)
    S = torch.cat([svd[1][:rank] for svd in updates])
    V = torch.cat([svd[2][:rank] for svd in updates]).T
    identity = torch.eye(len(S), dtype=S.dtype)
    raw = float(((U.T @ U - identity) @ torch.diag(S) @ (V.T @ V - identity)).abs().sum())
    return Interference(raw, raw / float(S.sum()))


def _mean(values: Iterable[Tensor]) -> float:
    """Return the mean; nan if there are none."""
    scalars = list(values)
    return float(torch.stack(scalars).mean()) if scalars else math.nan


def _gram(updates: Mapping[str, LoraDelta], module: str) -> Tensor:
    """Return one module's inner products [n, n], from one product of all stacked factors."""
    having = [name for name in updates if module in updates[name]]
    parts = [updates[name][module] for name in having]
    stack = stacked(parts)
    B, A = stack.B.double(), stack.A.double()
    products = (B.T @ B) * (A @ A.T)
    owners = torch.repeat_interleave(torch.tensor([part.rank for part in parts]))  # column of the stack → its update
    membership = nn.functional.one_hot(owners, len(parts)).double()
    inner = membership.T @ products @ membership
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    indices = torch.tensor([list(updates).index(name) for name in having])
    gram[indices[:, None], indices] = inner
    return gram

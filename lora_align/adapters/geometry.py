"""How updates lie to each other: lengths, angles, shared directions, spectra. Module by module, without forming ΔW."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_align.adapters import module_names
from lora_align.adapters.delta import ROUNDING, Factors, LoraDelta, rank_losing, stacked

Decomposed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Geometry:
    """Several updates and every module's inner products between them; each adapter is read once."""

    names: tuple[str, ...]
    grams: Mapping[str, Tensor]  # module → [n, n]

    @classmethod
    def of(cls, updates: Mapping[str, LoraDelta]) -> "Geometry":
        """Of named updates."""
        modules = dict.fromkeys(name for update in updates.values() for name in update)
        return cls(tuple(updates), {module: _gram(updates, module) for module in modules})

    @cached_property
    def gram(self) -> Tensor:
        """[n, n] over all modules."""
        return torch.stack(list(self.grams.values())).sum(0)

    def norms(self) -> dict[str, float]:
        """Frobenius norms."""
        return dict(zip(self.names, self.gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True))

    def cosines(self) -> list[list[float]]:
        """The matrix of angles' cosines; nan beside an update that is zero."""
        length = self.gram.diagonal().clamp(min=0).sqrt()
        return (self.gram / length[:, None] / length).clamp(-1, 1).tolist()

    def by_place(self) -> dict[str, dict[str, dict[int, float]]]:
        """Update → kind of module → layer (-1 where a name has none) → norm, of all experts together."""
        squares: dict[str, dict[str, dict[int, float]]] = {name: {} for name in self.names}
        places = {module: module_names.place(module) for module in self.grams}
        several = len({at.stack for at in places.values() if at}) > 1
        for module, gram in self.grams.items():
            at = places[module]
            kind = module.rpartition(".")[2] if at is None else f"{at.stack} {at.kind}" if several else at.kind
            for name, square in zip(self.names, gram.diagonal().clamp(min=0).tolist(), strict=True):
                of = squares[name].setdefault(kind, {})
                of[at.layer if at else -1] = of.get(at.layer if at else -1, 0.0) + square
        return {
            name: {kind: {layer: math.sqrt(square) for layer, square in of.items()} for kind, of in kinds.items()}
            for name, kinds in squares.items()
        }

    def coefficients(self, whole: str) -> dict[str, float]:
        """The weights of the others whose sum comes nearest to `whole`: what it holds of each by itself."""
        at = self.names.index(whole)
        others = [i for i in range(len(self.names)) if i != at]
        between, with_whole = self.gram[others][:, others], self.gram[others, at][:, None]
        found = torch.linalg.lstsq(between, with_whole, driver="gelsd").solution[:, 0].tolist()
        return dict(zip((self.names[i] for i in others), found, strict=True))


@dataclass(frozen=True)
class Spectrum:
    """An update's singular values over all its modules."""

    rank: int  # the largest of a module
    effective: float  # exp of the entropy of the squares: how many directions share the energy, the mean of the modules
    for_99: int  # the smallest rank for all modules that keeps 99 % of the energy
    shares: list[float]  # of the energy in the first direction of every module, in the second, and so on


@dataclass(frozen=True)
class Interference:
    """Singular task interference, ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the mean over modules; it grows with the norms."""

    raw: float
    by_size: float  # divided by ΣΣ, which does not


@dataclass(frozen=True)
class Directions:
    """What the singular directions of several updates tell. Made a module at a time; the directions are not kept."""

    squares: Mapping[str, Sequence[Tensor]]  # of every module's singular values
    cosines: Mapping[tuple[str, str], Sequence[tuple[Tensor, Tensor]]]  # of principal angles, of outputs and of inputs
    interferences: Sequence[Interference]

    @classmethod
    def of(cls, updates: Mapping[str, LoraDelta], rank: int) -> "Directions":
        """Of named updates; in the interference each counts with that many directions."""
        squares: dict[str, list[Tensor]] = {name: [] for name in updates}
        cosines: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {
            pair: [] for pair in itertools.combinations(updates, 2)
        }
        interferences = []
        for module in dict.fromkeys(module for update in updates.values() for module in update):
            apart = {name: _real_directions(update[module]) for name, update in updates.items() if module in update}
            apart = {name: parts for name, parts in apart.items() if len(parts[1])}
            for name, (_, S, _) in apart.items():
                squares[name].append(S.square())
            for one, other in itertools.combinations(apart, 2):
                (U, _, Vt), (P, _, Qt) = apart[one], apart[other]
                angles = (torch.linalg.svdvals(U.T @ P).clamp(max=1), torch.linalg.svdvals(Vt @ Qt.T).clamp(max=1))
                cosines[one, other].append(angles)
            if apart:
                interferences.append(_interference(list(apart.values()), rank))
        return cls(squares, cosines, interferences)

    def spectrum(self, name: str) -> Spectrum:
        """Of one update."""
        squares = self.squares[name]
        if not squares:
            return Spectrum(0, 0.0, 0, [])
        entropies = [float(torch.special.entr(one / one.sum()).sum()) for one in squares]
        energy = float(torch.cat(list(squares)).sum())
        effective = sum(map(math.exp, entropies)) / len(entropies)
        shares = (nn.utils.rnn.pad_sequence(list(squares)).sum(1) / energy).tolist()
        return Spectrum(len(shares), effective, rank_losing(0.01 * energy, squares), shares)

    def overlaps(self) -> list[dict[str, Any]]:
        """Of every two updates the principal angles between their outputs, and between their inputs, module by module.

        `outputs` and `inputs` are means of squared cosines: 0 where no direction is shared, 1 where all are. The others
        are means of the smallest angle, in degrees.
        """
        found: list[dict[str, Any]] = []
        for pair, modules in self.cosines.items():
            told: dict[str, Any] = {"of": list(pair)}
            for i, side in enumerate(("outputs", "inputs")):
                told[side] = _mean(both[i].square().mean() for both in modules)
                told[f"{side}_angle"] = math.degrees(_mean(both[i][0].acos() for both in modules))
            found.append(told)
        return found

    def interference(self) -> Interference:
        """Of all updates (https://arxiv.org/abs/2412.00081)."""
        count = len(self.interferences) or 1
        raw, by_size = (sum(getattr(one, name) for one in self.interferences) for name in ("raw", "by_size"))
        return Interference(raw / count, by_size / count)


def _real_directions(factors: Factors) -> Decomposed:
    """U, σ, Vᵀ without what is rounding."""
    U, S, Vt = factors.svd()
    real = int((ROUNDING * S[0] < S).sum())
    return U[:, :real], S[:real], Vt[:real]


def _interference(updates: Sequence[Decomposed], rank: int) -> Interference:
    """In one module, each update cut to that rank."""
    U = torch.cat([of[0][:, :rank] for of in updates], 1)
    S = torch.cat([of[1][:rank] for of in updates])
    V = torch.cat([of[2][:rank] for of in updates]).T
    one = torch.eye(len(S), dtype=S.dtype)
    raw = float(((U.T @ U - one) @ torch.diag(S) @ (V.T @ V - one)).abs().sum())
    return Interference(raw, raw / float(S.sum()))


def _mean(values: Iterable[Tensor]) -> float:
    """nan of none."""
    found = list(values)
    return float(torch.stack(found).mean()) if found else math.nan


def _gram(updates: Mapping[str, LoraDelta], module: str) -> Tensor:
    """[n, n] of one module, from the products of all factors at once."""
    having = [name for name in updates if module in updates[name]]
    parts = [updates[name][module] for name in having]
    all_of_them = stacked(parts)
    B, A = all_of_them.B.double(), all_of_them.A.double()
    products = (B.T @ B) * (A @ A.T)
    owner = torch.repeat_interleave(torch.tensor([part.rank for part in parts]))
    of_whom = nn.functional.one_hot(owner, len(parts)).double()
    inner = of_whom.T @ products @ of_whom
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    at = torch.tensor([list(updates).index(name) for name in having])
    gram[at[:, None], at] = inner
    return gram

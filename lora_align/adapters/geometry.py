"""How updates lie to each other: lengths, angles, shared directions, spectra. Module by module, without forming ΔW."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lora_align.adapters import layers
from lora_align.adapters.delta import ROUNDING, LoraDelta, rank_keeping, stacked

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
        places = {module: layers.place(module) for module in self.grams}
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


def decompositions(update: LoraDelta) -> dict[str, Decomposed]:
    """Every module's U, σ, Vᵀ without what is rounding."""
    found = {}
    for module, factors in update.items():
        U, S, Vt = factors.svd()
        real = int((ROUNDING * S[0] < S).sum())
        found[module] = (U[:, :real], S[:real], Vt[:real])
    return found


def spectrum(found: Mapping[str, Decomposed]) -> Spectrum:
    """Of an update's decompositions."""
    squares = [S.square() for _, S, _ in found.values() if len(S)]
    if not squares:
        return Spectrum(0, 0.0, 0, [])
    entropies = [float(torch.special.entr(one / one.sum()).sum()) for one in squares]
    energy = float(torch.cat(squares).sum())
    effective = sum(map(math.exp, entropies)) / len(entropies)
    shares = (nn.utils.rnn.pad_sequence(squares).sum(1) / energy).tolist()
    return Spectrum(len(shares), effective, rank_keeping(0.99, squares, energy), shares)


def overlap(one: Mapping[str, Decomposed], other: Mapping[str, Decomposed]) -> dict[str, float]:
    """The principal angles between two updates' outputs, and between their inputs, as means over modules.

    `outputs` and `inputs` are mean squared cosines: 0 where no direction is shared, 1 where all are. The others are
    the smallest angles, in degrees.
    """
    shared = [module for module in one if module in other and len(one[module][1]) and len(other[module][1])]
    if not shared:
        return dict.fromkeys(("outputs", "outputs_angle", "inputs", "inputs_angle"), math.nan)
    outputs = [torch.linalg.svdvals(one[name][0].T @ other[name][0]).clamp(max=1) for name in shared]
    inputs = [torch.linalg.svdvals(one[name][2] @ other[name][2].T).clamp(max=1) for name in shared]
    return {
        "outputs": _mean(cosines.square().mean() for cosines in outputs),
        "outputs_angle": math.degrees(_mean(cosines[0].acos() for cosines in outputs)),
        "inputs": _mean(cosines.square().mean() for cosines in inputs),
        "inputs_angle": math.degrees(_mean(cosines[0].acos() for cosines in inputs)),
    }


@dataclass(frozen=True)
class Interference:
    """Singular task interference, ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the mean over modules; it grows with the norms."""

    raw: float
    by_size: float  # divided by ΣΣ, which does not


def interference(updates: Sequence[Mapping[str, Decomposed]], rank: int) -> Interference:
    """Of several updates, each cut to that rank (https://arxiv.org/abs/2412.00081)."""
    raw, by_size = [], []
    for module in dict.fromkeys(module for update in updates for module in update):
        cut = [(U[:, :rank], S[:rank], Vt[:rank]) for U, S, Vt in (u[module] for u in updates if module in u) if len(S)]
        if not cut:
            continue
        U, S, Vt = (
            torch.cat([u for u, *_ in cut], 1),
            torch.cat([s for _, s, _ in cut]),
            torch.cat([v for *_, v in cut]),
        )
        one = torch.eye(len(S), dtype=S.dtype)
        raw.append(float(((U.T @ U - one) @ torch.diag(S) @ (Vt @ Vt.T - one)).abs().sum()))
        by_size.append(raw[-1] / float(S.sum()))
    return Interference(sum(raw) / len(raw), sum(by_size) / len(by_size)) if raw else Interference(0.0, 0.0)


def _mean(values: Iterable[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


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

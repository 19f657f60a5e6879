"""The command `inspect`: norms, angles, spectra and interference of vectors, and their weights in a mix."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.adapters import same_base
from lora_align.adapters.delta import LoraDelta, total
from lora_align.adapters.geometry import Directions, Geometry, Interference, Overlap, Spectrum
from lora_align.adapters.merge_options import MergeOptions
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.streamed_merge import Tally
from lora_align.commands import merge
from lora_align.console import table
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe

INTERFERING = 8  # singular directions of each vector that the interference compares (https://arxiv.org/abs/2504.20106)
SMALL = 0.01  # warn of a vector whose norm is at most this share of the largest norm
MOST_KINDS = 7  # kinds of modules that fit into a table
MIX, START = "(mix)", "(start)"


@dataclass(frozen=True)
class VectorFigures(Spectrum):
    """The spectrum and the norm of a vector, and where its energy lies."""

    norm: float
    cos_pos_neg: float | None  # cosine of a preference's two adapters; None for a single adapter
    by_place: Mapping[str, Mapping[int, float]]  # kind of module → layer → norm
    shares_by: Mapping[str, Mapping[Any, float]]  # by "kind" of module or "layer" → kind or layer → share of the energy


@dataclass(frozen=True)
class MixWeight:
    """The requested weight of a vector, and its effective weight, which best explains the mix (least squares)."""

    asked: float
    held: float


@dataclass(frozen=True)
class MixFigures:
    """The mix that `merge` would publish, against the exact sum."""

    weights: Mapping[str, MixWeight]
    method: str
    rank: int
    norm: float
    left_out: float  # share of the energy
    cosine_with_sum: float


@dataclass(frozen=True)
class Inspection:
    """Figures of vectors and of one mix. A cosine is nan if one of the vectors is zero."""

    vectors: Mapping[str, VectorFigures]
    cosines: Mapping[str, Sequence[float]]
    overlaps: Sequence[Overlap]
    agreement: Mapping[str, Sequence[float]]  # preference → cosines between the runs that were trained for it
    interference: Interference
    mix: MixFigures | None
    doubts: Sequence[str]  # warnings
    picture: str | None

    def as_json(self) -> dict[str, Any]:
        """Return plain data, with None for nan."""
        return {key: _without_nan(value) for key, value in asdict(self).items()}

    def summary(self) -> str:
        """Return tables of the vectors, of their angles and of the mix."""
        columns = ["vector", "norm", "cos(pos, neg)", "rank", "effective rank", "rank for 99%"]
        rows = [
            [name, f"{v.norm:.3g}", _number(v.cos_pos_neg), str(v.rank), f"{v.effective:.1f}", str(v.for_99)]
            for name, v in self.vectors.items()
        ]
        parts = [table(columns, rows)]
        kinds = list(dict.fromkeys(kind for figures in self.vectors.values() for kind in figures.by_place))
        if 1 < len(kinds) <= MOST_KINDS:
            shares = {name: figures.shares_by["kind"] for name, figures in self.vectors.items()}
            rows = [[name, *(f"{of.get(kind, 0.0):.0%}" for kind in kinds)] for name, of in shares.items()]
            parts.append(table(["energy in", *kinds], rows))
        if len(self.cosines) > 1:
            rows = [[name, *map(_number, cosines)] for name, cosines in self.cosines.items()]
            parts.append(table(["cosine", *self.cosines], rows))
            rows = [[" and ".join(pair.of), _number(pair.outputs), _number(pair.inputs)] for pair in self.overlaps]
            parts.append(table(["directions shared by", "outputs", "inputs"], rows))
            parts.append(
                f"interference (STI) {self.interference.raw:.3g}, by size {self.interference.by_size:.3f}"
                "; inputs overlap more if vectors share the initial A"
            )
        for preference, cosines in self.agreement.items():
            parts.append(f"{preference}: cosines between its runs are {min(cosines):.3f} to {max(cosines):.3f}")
        if mix := self.mix:
            rows = [[name, f"{weight.asked:g}", _number(weight.held)] for name, weight in mix.weights.items()]
            parts.append(table(["in the mix", "requested weight", "effective weight"], rows))
            parts.append(
                f"the mix: norm {mix.norm:.3g}, rank {mix.rank}, {mix.left_out:.2%} of its energy left out, "
                f"cosine with the exact sum {_number(mix.cosine_with_sum)}"
            )
        return "\n\n".join(filter(None, [*parts, self.picture]))


def inspect_vectors(
    names: Sequence[str],
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    how: MergeOptions,
    picture: Path | None,
) -> Inspection:
    """Measure the named vectors, or all trained ones, and the mix of `weights` if there are any."""
    named = list(dict.fromkeys([*names, *weights])) or vectors.trained(runs_dir)
    if not named:
        command = runs.command("dpo --all", runs_dir)
        raise UserError(f"inspect: no preference is trained in {runs_dir}/; run `{command}`, or name folders")
    by_name = {name: vectors.find(name, runs_dir, recipe.preferences) for name in named}
    vectors.common_base(by_name.values())
    updates, adapters = vectors.load_updates(by_name)
    same_base.check_same_base(adapters, same_base=True)
    geometry = Geometry.of(updates)
    norms, places, cosines = geometry.norms(), geometry.by_place(), geometry.cosines()
    scaled = {name: update * (weights.get(name) or 1.0) for name, update in updates.items()}
    directions = Directions.of(scaled, INTERFERING)
    if picture:
        from lora_align.metrics import plots

        plots.layer_maps(picture, places)
    return Inspection(
        vectors={
            name: VectorFigures(
                **vars(directions.spectrum(name)),
                norm=norms[name],
                cos_pos_neg=_cosine_of_sides(by_name[name], adapters),
                by_place=places[name],
                shares_by=_shares(places[name]),
            )
            for name in named
        },
        cosines=dict(zip(named, cosines, strict=True)),
        overlaps=directions.overlaps(),
        agreement=_agreement(by_name, cosines),
        interference=directions.interference(),
        mix=_measure_mix(weights, recipe, runs_dir, how) if weights else None,
        doubts=[*_base_warnings(adapters), *_vector_warnings(by_name, norms)],
        picture=str(picture) if picture else None,
    )


def _shares(places: Mapping[str, Mapping[int, float]]) -> dict[str, dict[Any, float]]:
    """Return the share of a vector's energy in each kind of module, and in each layer."""
    energies: dict[str, dict[Any, float]] = {"kind": {}, "layer": {}}
    for kind, norms in places.items():
        for layer, norm in norms.items():
            for by, which in (("kind", kind), ("layer", layer)):
                energies[by][which] = energies[by].get(which, 0.0) + norm**2
    whole = sum(energies["kind"].values()) or 1.0
    return {by: {which: energy / whole for which, energy in sorted(of.items())} for by, of in energies.items()}


def _cosine_of_sides(vector: Vector, adapters: Sequence[Adapter]) -> float | None:
    if [parent.sign for parent in vector.parents] != [1.0, -1.0]:
        return None
    opened = {adapter.folder.resolve(): adapter for adapter in adapters}
    pos, neg = (LoraDelta.of(opened[parent.folder.resolve()]) for parent in vector.parents)
    return pos.cosine(neg)


def _agreement(by_name: Mapping[str, Vector], cosines: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Return the cosines between vectors of the same preference, for example trained with different seeds."""
    agreement: dict[str, list[float]] = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(by_name.values()), 2):
        shared = {run.manifest.preference for run in a.known_runs()} & {r.manifest.preference for r in b.known_runs()}
        signs = [[parent.sign for parent in vector.parents] for vector in (a, b)]
        if len(shared) == 1 and shared != {""} and signs[0] == signs[1]:
            agreement.setdefault(shared.pop(), []).append(cosines[i][j])
    return agreement


def _measure_mix(weights: Mapping[str, float], recipe: Recipe, runs_dir: Path, how: MergeOptions) -> MixFigures:
    """Compute the mix with its method and rank, and compare it with the exact sum."""
    job, tally = merge.prepare(weights, recipe, runs_dir, how).merge, Tally()
    mix = LoraDelta.of(dict(tally.counted(job.modules(merge.ranks(job, how)[0]))))
    parts = {**job.vectors, **({START: job.start} if len(job.start) else {})}
    effective = Geometry.of({**parts, MIX: mix}).coefficients(MIX)
    exact = total([job.start, *(job.vectors[name] * weight for name, weight in weights.items())])
    return MixFigures(
        weights={name: MixWeight(weight, effective[name]) for name, weight in weights.items()},
        method=how.method,
        rank=tally.rank,
        norm=mix.norm(),
        left_out=tally.left_out,
        cosine_with_sum=mix.cosine(exact),
    )


def _base_warnings(adapters: Sequence[Adapter]) -> list[str]:
    """Return a warning if the adapters name different bases. `inspect` measures them, but `merge` refuses them."""
    bases = sorted({adapter.base for adapter in adapters if adapter.base})
    return (
        [f"these adapters name different bases ({', '.join(bases)}): angles mean little; compare adapters of one base"]
        if len(bases) > 1
        else []
    )


def _vector_warnings(by_name: Mapping[str, Vector], norms: Mapping[str, float]) -> list[str]:
    """Return warnings of vectors that may not do what their names say."""
    largest = max(norms.values())
    small = [
        f"{name} is too small to have an effect (norm {norm:.2g}, the largest is {largest:.2g})"
        for name, norm in norms.items()
        if norm <= SMALL * largest
    ]
    return [*small, *(warning for vector in by_name.values() for warning in vector.warnings())]


def _without_nan(value: Any) -> Any:
    """Return the value with None for every nan, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"

"""What vectors are and how they lie to each other, and what a mix keeps of each. No base is loaded."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_align.adapters import same_base
from lora_align.adapters.delta import LoraDelta, total
from lora_align.adapters.geometry import Directions, Geometry
from lora_align.adapters.merge_options import MergeOptions
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.streamed_merge import Tally
from lora_align.commands import merge
from lora_align.console import table
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe

TRUNCATED = 8  # directions of a vector that count in the interference, as in the preference vectors' paper
SMALL = 0.01  # of the longest vector's norm
WIDE = 7  # kinds of modules that a table has room for
MIX, START = "(mix)", "(start)"


def inspect_vectors(
    names: Sequence[str],
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    how: MergeOptions,
    picture: Path | None,
) -> dict[str, Any]:
    """Measure the named vectors, or all that are trained; with weights also the mix of those."""
    named = list(dict.fromkeys([*names, *weights])) or vectors.trained(runs_dir)
    if not named:
        raise UserError(f"nothing to look at in {runs_dir}/: no preference is trained there; name adapter folders")
    found = {name: vectors.find(name, runs_dir, recipe.preferences) for name in named}
    vectors.common(found.values())
    updates, adapters = vectors.opened(found)
    same_base.check_same_base(adapters, same_base=True)
    known = Geometry.of(updates)
    norms, places = known.norms(), known.by_place()
    directions = Directions.of(
        {name: update * (weights.get(name) or 1.0) for name, update in updates.items()}, TRUNCATED
    )
    facts: dict[str, Any] = {
        "vectors": {
            name: {
                "norm": norms[name],
                "cos_pos_neg": _between_sides(found[name], adapters),
                **asdict(directions.spectrum(name)),
                "by_place": places[name],
                "shares_by": _shares(places[name]),
            }
            for name in named
        },
        "cosines": dict(zip(named, known.cosines(), strict=True)),
        "overlaps": directions.overlaps(),
        "agreement": _agreement(found, known),
        "interference": asdict(directions.interference()),
        "mix": _mixed(weights, recipe, runs_dir, how) if weights else None,
        "doubts": [*_strangers(adapters), *_doubts(found, norms)],
        "picture": str(picture) if picture else None,
    }
    if picture:
        from lora_align.metrics import plots

        plots.layer_maps(picture, places)
    return {key: _without_nan(value) for key, value in facts.items()}


def summary(facts: Mapping[str, Any]) -> str:
    """Tables, then what is worth a sentence."""
    parts = [
        table(
            ["vector", "norm", "cos(pos, neg)", "rank", "effective", "for 99 %"],
            [
                [
                    name,
                    f"{of['norm']:.3g}",
                    _number(of["cos_pos_neg"]),
                    str(of["rank"]),
                    f"{of['effective']:.1f}",
                    str(of["for_99"]),
                ]
                for name, of in facts["vectors"].items()
            ],
        )
    ]
    kinds = list(dict.fromkeys(kind for of in facts["vectors"].values() for kind in of["by_place"]))
    if 1 < len(kinds) <= WIDE:
        rows = [
            [name, *(f"{of['shares_by']['kind'].get(kind, 0.0):.0%}" for kind in kinds)]
            for name, of in facts["vectors"].items()
        ]
        parts.append(table(["share of", *kinds], rows))
    if len(facts["cosines"]) > 1:
        rows = [[name, *map(_number, cosines)] for name, cosines in facts["cosines"].items()]
        parts.append(table(["cosine", *facts["cosines"]], rows))
        overlaps = [[" and ".join(of["of"]), _number(of["outputs"]), _number(of["inputs"])] for of in facts["overlaps"]]
        parts.append(table(["directions shared by", "outputs", "inputs"], overlaps))
        interference = facts["interference"]
        parts.append(f"interference (STI) {interference['raw']:.3g}, by size {interference['by_size']:.3f}")
        parts[-1] += "; a shared start of A alone makes inputs overlap"
    for preference, cosines in facts["agreement"].items():
        parts.append(f"{preference} of several runs agrees at {min(cosines):.3f} to {max(cosines):.3f}")
    if facts["mix"]:
        rows = [[name, f"{of['asked']:g}", _number(of["held"])] for name, of in facts["mix"]["weights"].items()]
        parts.append(table(["in the mix", "weight asked", "weight held"], rows))
        parts.append(
            f"the mix: norm {facts['mix']['norm']:.3g}, rank {facts['mix']['rank']}, "
            f"{facts['mix']['left_out']:.2%} of its energy left out, "
            f"cosine with the exact sum {_number(facts['mix']['cosine_with_sum'])}"
        )
    return "\n\n".join([*parts, *([facts["picture"]] if facts["picture"] else [])])


def _shares(places: Mapping[str, Mapping[int, float]]) -> dict[str, dict[Any, float]]:
    """How much of a vector's energy lies in each kind of module, and in each layer."""
    energies: dict[str, dict[Any, float]] = {"kind": {}, "layer": {}}
    for kind, norms in places.items():
        for layer, norm in norms.items():
            for by, which in (("kind", kind), ("layer", layer)):
                energies[by][which] = energies[by].get(which, 0.0) + norm**2
    whole = sum(energies["kind"].values()) or 1.0
    return {by: {which: energy / whole for which, energy in sorted(of.items())} for by, of in energies.items()}


def _strangers(adapters: Sequence[Adapter]) -> list[str]:
    """What is measured side by side need not be added; but that its bases differ by name is said."""
    named = sorted({adapter.base for adapter in adapters if adapter.base})
    return [f"these name different bases ({', '.join(named)}): their angles mean little"] if len(named) > 1 else []


def _between_sides(vector: Vector, adapters: Sequence[Adapter]) -> float | None:
    """The cosine of a preference's two adapters; an adapter by itself has none."""
    if [parent.sign for parent in vector.parents] != [1.0, -1.0]:
        return None
    opened = {adapter.folder.resolve(): adapter for adapter in adapters}
    pos, neg = (LoraDelta.of(opened[parent.folder.resolve()]) for parent in vector.parents)
    return pos.cosine(neg)


def _agreement(found: Mapping[str, Vector], known: Geometry) -> dict[str, list[float]]:
    """Of every preference that several of these were trained for, as with other seeds: the cosines between them."""
    cosines = known.cosines()
    alike: dict[str, list[float]] = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(found.values()), 2):
        shared = {run.manifest.preference for run in a.known_runs()} & {r.manifest.preference for r in b.known_runs()}
        signs = [[parent.sign for parent in vector.parents] for vector in (a, b)]
        if len(shared) == 1 and shared != {""} and signs[0] == signs[1]:
            alike.setdefault(shared.pop(), []).append(cosines[i][j])
    return alike


def _mixed(weights: Mapping[str, float], recipe: Recipe, runs_dir: Path, how: MergeOptions) -> dict[str, Any]:
    """What the mix that `merge` would make holds of each of its vectors, after its method and its rank."""
    job, tally = merge.prepare(weights, recipe, runs_dir, how).merge, Tally()
    made = LoraDelta.of(dict(tally.counted(job.modules(merge.ranks(job, how)[0]))))
    parts = {**job.vectors, **({START: job.start} if len(job.start) else {})}
    held = Geometry.of({**parts, MIX: made}).coefficients(MIX)
    whole = total([job.start, *(job.vectors[name] * weight for name, weight in weights.items())])
    return {
        "weights": {name: {"asked": weight, "held": held[name]} for name, weight in weights.items()},
        "method": how.method,
        "rank": tally.rank,
        "norm": made.norm(),
        "left_out": tally.left_out,
        "cosine_with_sum": made.cosine(whole),
    }


def _doubts(found: Mapping[str, Vector], norms: Mapping[str, float]) -> list[str]:
    """Vectors that may not do what their names say, and why."""
    longest = max(norms.values())
    small = [
        f"{name} is too small to do anything (norm {norm:.2g}, the longest has {longest:.2g})"
        for name, norm in norms.items()
        if norm <= SMALL * longest
    ]
    return [*small, *(doubt for vector in found.values() for doubt in vector.doubts())]


def _without_nan(value: Any) -> Any:
    """The same, with None for what is no number: JSON knows no nan."""
    if isinstance(value, Mapping):
        return {key: _without_nan(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_without_nan(held) for held in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

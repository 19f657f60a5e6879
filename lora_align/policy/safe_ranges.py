"""The largest safe weights that `reach` found, and warnings of weights beyond them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import table
from lora_align.policy.vectors import Vector
from lora_align.runs import Run

FOLDER = "reach"  # in the runs folder
FAR = 2.0  # the weight beyond which to warn if `reach` has not measured a vector; training uses weight 1


@dataclass(frozen=True)
class Side:
    """The largest safe weight on one side of 0, and the figure that breaks at the next step ("" if none breaks)."""

    to: float
    breaks: str

    def text(self, sign: int = 1) -> str:
        """Return the weight with its sign, and what breaks beyond it."""
        return f"{sign * self.to + 0.0:g}" + (f" (next step: {self.breaks})" if self.breaks else " (largest tested)")


@dataclass(frozen=True)
class VectorReach:
    """The reach of one vector, and the line fitted to its margin as a function of its weight."""

    up: Side
    down: Side
    slope: float  # nats of margin for a weight of 1
    r2: float


@dataclass(frozen=True)
class PairReach:
    """The reach of two vectors with equally large weights, for each combination of signs."""

    names: tuple[str, ...]
    sides: Mapping[tuple[float, ...], Side]  # by the signs of both weights
    term: Mapping[str, float]  # preference → the part of its margin at weights 1, 1 that single vectors do not explain


@dataclass(frozen=True)
class Reach:
    """The largest safe weights of vectors, one by one and in pairs."""

    alone: Mapping[str, VectorReach]
    together: Sequence[PairReach]
    limits: Mapping[str, float]

    @classmethod
    def from_json(cls, metrics: Mapping[str, Any]) -> "Reach":
        """Read the metrics of a manifest."""
        alone = {
            name: VectorReach(Side(**of["up"]), Side(**of["down"]), of["slope"], of["r2"])
            for name, of in metrics["alone"].items()
        }
        together = [
            PairReach(
                tuple(of["names"]),
                {tuple(side["signs"]): Side(side["to"], side["breaks"]) for side in of["sides"]},
                of["term"],
            )
            for of in metrics["together"]
        ]
        return cls(alone, together, metrics["limits"])

    def as_json(self) -> dict[str, Any]:
        """Return the metrics of the run's manifest."""
        together = [
            {
                "names": pair.names,
                "sides": [{"signs": signs, **asdict(side)} for signs, side in pair.sides.items()],
                "term": pair.term,
            }
            for pair in self.together
        ]
        return {
            "alone": {name: asdict(of) for name, of in self.alone.items()},
            "together": together,
            "limits": self.limits,
        }

    def summary(self) -> str:
        """Return a table of the vectors. With two or more, add tables of the pairs and of their interaction."""
        rows = [
            [name, of.down.text(-1), of.up.text(), f"{of.slope:.2f}", f"{of.r2:.3f}"] for name, of in self.alone.items()
        ]
        parts = [table(["", "lowest weight", "highest weight", "margin per weight", "R²"], rows)]
        if self.together:
            sides = [
                [
                    ", ".join(f"{name} {up_or_down(sign)}" for name, sign in zip(pair.names, signs, strict=True)),
                    side.text(),
                ]
                for pair in self.together
                for signs, side in pair.sides.items()
            ]
            terms = [
                [" and ".join(pair.names), *(f"{pair.term[name]:+.2f}" for name in pair.names)]
                for pair in self.together
            ]
            parts.append(table(["two equal weights", "largest"], sides))
            parts.append(table(["interaction", "in the first's margin", "in the second's"], terms))
        return "\n\n".join(parts)


def up_or_down(sign: float) -> str:
    """Return the word for a sign."""
    return "up" if sign > 0 else "down"


def warnings_beyond_reach(weights: Mapping[str, float], vectors: Mapping[str, Vector], runs_dir: Path) -> list[str]:
    """Return a warning for each weight, and each pair of weights, beyond what `reach` found safe.

    The newest run of `reach` counts. Vectors that it has not measured are safe up to FAR.
    """
    made = runs.list_runs(runs_dir / FOLDER)[::-1]
    named = [name for name, weight in weights.items() if weight and name in vectors]
    lineages = {name: json.dumps(vectors[name].lineage()) for name in named}
    warnings = {name: _alone(name, weights[name], lineage, made, runs_dir) for name, lineage in lineages.items()}
    safe = [name for name in lineages if not warnings[name]]
    pairs = [_together(pair, weights, [lineages[name] for name in pair], made) for pair in combinations(safe, 2)]
    return list(filter(None, [*warnings.values(), *pairs]))


def measured(vector: Vector, runs_dir: Path) -> tuple[VectorReach, Run] | None:
    """Return what the newest run of `reach` that measured a vector found, and that run."""
    found = _newest(runs.list_runs(runs_dir / FOLDER)[::-1], [json.dumps(vector.lineage())])
    return (Reach.from_json(found[0].manifest.metrics).alone[found[1][0]], found[0]) if found else None


def _alone(name: str, weight: float, lineage: str, made: Sequence[Run], runs_dir: Path) -> str:
    if measured := _newest(made, [lineage]):
        run, [measured_name] = measured
        vector = Reach.from_json(run.manifest.metrics).alone[measured_name]
        side = vector.up if weight > 0 else vector.down
        return f"{name}={weight:g} is {_beyond(side, run, weight)}" if abs(weight) > side.to else ""
    if abs(weight) <= FAR:
        return ""
    command = runs.command("reach", runs_dir)
    return (
        f"{name}={weight:g} is far beyond 1, the weight in training, so answers may break; "
        f"`{command}` finds the largest safe weight"
    )


def _together(pair: Sequence[str], weights: Mapping[str, float], lineages: Sequence[str], made: Sequence[Run]) -> str:
    """Return a warning if the smaller of two weights is beyond the safe weight of both together."""
    if not (measured := _newest(made, lineages)):
        return ""
    run, names = measured
    signs = {measured_name: 1.0 if weights[name] > 0 else -1.0 for name, measured_name in zip(pair, names, strict=True)}
    for both in Reach.from_json(run.manifest.metrics).together:
        if set(both.names) == set(names):
            side = both.sides[tuple(signs[name] for name in both.names)]
            if min(abs(weights[name]) for name in pair) > side.to:
                return f"{' with '.join(f'{name}={weights[name]:g}' for name in pair)} is {_beyond(side, run)}"
    return ""


def _newest(made: Sequence[Run], lineages: Sequence[str]) -> tuple[Run, list[str]] | None:
    """Return the newest run that measured all of these vectors, and their names in that run."""
    for run in made:
        names = {json.dumps(lineage): name for name, lineage in run.manifest.method["vectors"].items()}
        if names.keys() >= set(lineages):
            return run, [names[lineage] for lineage in lineages]
    return None


def _beyond(side: Side, run: Run, sign: float = 1.0) -> str:
    why = f" (one step further: {side.breaks})" if side.breaks else ", the largest weight that was tested"
    safe = side.to if sign > 0 else 0.0 - side.to  # never -0
    return f"beyond the safe weight {safe:g}{why}; choose a weight closer to 0 (measured in {run.path})"

"""What `reach` has found: how far vectors go before something breaks, for those who weigh them afterwards."""

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.policy.vectors import Vector
from lora_align.runs import Run

FOLDER = "reach"  # of the runs folder
FAR = 2.0  # a weight that no vector was trained near


def warnings_beyond_reach(weights: Mapping[str, float], found: Mapping[str, Vector], runs_dir: Path) -> list[str]:
    """Name weights that lie farther out than `reach` found safe; of vectors it has not measured, those beyond FAR."""
    measured = _measured(runs_dir)
    made_of = {name: found[name].lineage() for name, weight in weights.items() if weight and name in found}
    told = {name: why for name, of in made_of.items() if (why := _alone(name, weights[name], of, measured, runs_dir))}
    for one, other in combinations(made_of, 2):
        if one not in told and other not in told:
            told |= _together(one, other, weights, made_of, measured)
    return list(told.values())


def _measured(runs_dir: Path) -> list[Run]:
    """The newest first."""
    return runs.list_runs(runs_dir / FOLDER)[::-1]


def _alone(name: str, weight: float, made_of: list[Any], measured: list[Run], runs_dir: Path) -> str:
    for run in measured:
        for known, of in run.manifest.method["vectors"].items():
            if of == made_of:
                side = run.manifest.metrics["alone"][known]["up" if weight > 0 else "down"]
                if abs(weight) > side["to"]:
                    return f"{name}={weight:g} is {_told(side, run)}"
                return ""
    if abs(weight) <= FAR:
        return ""
    safe = f"`{runs.command('reach', runs_dir)}` finds how far is safe"
    return f"{name}={weight:g} is far beyond what it was trained at (1), and answers may break; {safe}"


def _together(
    one: str, other: str, weights: Mapping[str, float], made_of: Mapping[str, list[Any]], measured: list[Run]
) -> Iterator[tuple[str, str]]:
    """Of two that are turned alike: by the one that is turned less, in the quarter that both lie in."""
    least = min(abs(weights[one]), abs(weights[other]))
    up = {json.dumps(made_of[name]): weights[name] > 0 for name in (one, other)}
    for run in measured:
        known = {name: json.dumps(of) for name, of in run.manifest.method["vectors"].items()}
        for pair in run.manifest.metrics["together"]:
            if {known[name] for name in pair["names"]} != up.keys():
                continue
            quarter = [up[known[name]] for name in pair["names"]]
            side = next(side for side in pair["sides"] if [sign > 0 for sign in side["signs"]] == quarter)
            if least > side["to"]:
                yield f"{one} {other}", f"{one}={weights[one]:g} with {other}={weights[other]:g} is {_told(side, run)}"
            return


def _told(side: Mapping[str, Any], run: Run) -> str:
    why = f": {side['breaks']}" if side["breaks"] else ", the farthest that was measured"
    return f"farther out than {side['to']:g}{why} ({run.path})"

"""A grid of weights or of directions, every point measured like any policy: files, pictures, a page."""

import csv
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_align import runs, want
from lora_align.console import Screen, table
from lora_align.data import shards
from lora_align.errors import UserError
from lora_align.evaluate import sweep_plots, sweep_report
from lora_align.evaluate.figures import figures, wins
from lora_align.evaluate.goals import Score, score_of
from lora_align.evaluate.grid import grid, weights_text
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.sweep_point import SweepPoint
from lora_align.metrics import pareto
from lora_align.metrics.intervals import Estimate
from lora_align.policy.policy import START, WANT, Policy, find_policies, newest_conditioned
from lora_align.recipe import Recipe
from lora_align.runs import Manifest, Run
from lora_align.want import Want


def directions(count: int, runs_dir: Path, screen: Screen) -> tuple[dict[str, Want], dict[str, bool]]:
    """Directions over the region the newest policy was trained on, evenly for two objectives, else drawn, by the words
    that name them; and of each objective whether less of it is wanted there."""
    region = newest_conditioned(runs_dir, "--directions", screen).manifest.recipe["rsf"]["directions"]
    draw = random.Random(0)
    drawn = [want.sample_direction(region, draw) for _ in range(count if len(region) > 2 else 50 * count)]
    if len(region) == 2:
        drawn.sort(key=lambda one: math.atan2(*one.weights.values()))
        drawn = [drawn[place * (len(drawn) - 1) // max(count - 1, 1)] for place in range(count)]
    words = [",".join(f"{name}={weight:.3f}" for name, weight in one.weights.items()) for one in drawn]
    asked = {f"{WANT}:{word}": one for word, one in zip(words, drawn, strict=True)}
    return asked, {name: high <= 0 for name, (_, high) in region.items()}


def run_sweep(
    axes: Sequence[str],
    also: Sequence[str],
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    evaluate: Callable[[Sequence[Policy]], Evaluator],
    *,
    asked: int,
    name: str,
    force: bool,
) -> Run:
    """Measure every point, and as many directions as are `asked`, then write what it comes to. What was measured before
    is not measured again."""
    target = runs_dir / "sweep" / name
    runs.refuse_existing(target, force)
    values, points = grid(axes)
    wanted, objectives = directions(asked, runs_dir, screen) if asked else ({}, {})
    if not axes and not wanted:
        raise UserError("sweep: over what? axes, as in helpful=-1:1:0.5, or --directions")
    words = list(dict.fromkeys([START, *(weights_text(point) for point in points), *wanted, *also]))
    of_word = {weights_text(point): point for point in points}
    of_word.setdefault(START, dict.fromkeys(values, 0.0))
    evaluator = evaluate(find_policies(words, recipe, runs_dir, screen))
    with runs.staging_folder(target, screen, force=force) as staging:
        found = list(evaluator.measure_all(screen))
        told_of = [figures(one) for one in found]
        names = list(dict.fromkeys(name for of in told_of for name in of))
        rankers = {name: table.ranker for name, table in recipe.preferences.items() if not table.of}
        goals = {axis: score_of(axis, names, rankers.get(axis.partition("@")[0])) for axis in values}
        goals |= {name: score_of(name, names, less=less) for name, less in objectives.items()}
        scores = {goal: score for goal, score in goals.items() if score}
        less = {score.name for score in scores.values() if score.less}
        measured_points = [
            SweepPoint(word, of_word.get(word), wanted.get(word), one, of, wins(one, found[0], less))
            for word, one, of in zip(words, found, told_of, strict=True)
        ]
        result = _written(values, names, scores, measured_points, staging)
        base = evaluator.base.identity
        sweep_report.write(staging, f"sweep {name}", base["model"], result, covered(result), measured_points)
        manifest = Manifest(stage="sweep", base=base, recipe=recipe.as_dict(), method={"axes": values}, metrics=result)
        return runs.publish(staging, target, manifest)


def summary(made: Run) -> str:
    """The front, and where to look."""
    result = made.manifest.metrics
    names = list(result["scores"].values())
    rows = [[point["word"], *(f"{point[name]:.2f}" for name in names)] for point in result["front"]]
    parts = ["points that no other beats:", table(["", *names], rows), covered(result), f"{made.path}/report.html"]
    return "\n\n".join(filter(None, parts))


def covered(result: Mapping[str, Any]) -> str:
    """How much the front dominates, and beyond which corner: that of the worst value of each score in the sweep."""
    if len(result["scores"]) < 2:
        return ""
    corner = ", ".join(f"{name} {edge:.2f}" for name, edge in result["above"].items())
    return f"hypervolume {result['hypervolume']:.3f}, measured from the worst of each: {corner}"


def _written(
    values: Mapping[str, Sequence[float]],
    names: Sequence[str],
    scores: Mapping[str, Score],
    points: Sequence[SweepPoint],
    folder: Path,
) -> dict[str, Any]:
    """Tables and pictures; what they come to, by the score of each goal."""
    with (folder / "points.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        header = ["policy", *values, *(f"{name}{end}" for name in names for end in ("", " low", " high"))]
        writer.writerow(map(_no_formula, header))
        for point in points:
            weights = [point.weights[axis] if point.weights else "" for axis in values]
            cells = [_cells(point.figures.get(name)) for name in names]
            writer.writerow([_no_formula(point.word), *weights, *itertools.chain.from_iterable(cells)])
    rows = [{"policy": point.word, **row} for point in points for row in point.measured.answers]
    shards.write(rows, folder / "answers.parquet")
    facts = [
        {
            "policy": point.word,
            "weights": point.weights,
            "figures": {name: asdict(figure) for name, figure in point.figures.items()},
            "wins": {name: asdict(figure) for name, figure in point.wins.items()},
        }
        for point in points
    ]
    (folder / "points.json").write_text(json.dumps(facts, indent=1))
    inside = [point for point in points if all(score.name in point.figures for score in scores.values())]
    places = [[score.worth(point.figures) for score in scores.values()] for point in inside]
    best = pareto.front(places) if scores else []
    worst = [min(column) for column in zip(*places, strict=True)]
    sweep_plots.draw(folder, values, scores, points)
    return {
        "scores": {goal: str(score) for goal, score in scores.items()},
        "points": len(points),
        "front": [
            {"word": inside[i].word, **{str(score): inside[i].figures[score.name].value for score in scores.values()}}
            for i in sorted(best, key=lambda i: places[i])
        ],
        "hypervolume": pareto.hypervolume(places, worst) if len(scores) > 1 else 0.0,
        "above": {
            str(score): -edge if score.less else edge for score, edge in zip(scores.values(), worst, strict=False)
        },
    }


def _no_formula(text: str) -> str:
    """Text that a spreadsheet shows and does not compute."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _cells(figure: Estimate | None) -> list[float | str]:
    return [figure.value, figure.low, figure.high] if figure else ["", "", ""]

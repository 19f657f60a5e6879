"""The command `sweep`: measure a grid of weights or directions, and write tables, plots and a report."""

import csv
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_align import run_writer
from lora_align.console import Screen
from lora_align.data import shards
from lora_align.evaluate import equal_kl, sweep_plots, sweep_report
from lora_align.evaluate.equal_kl import AtEqualKL, Curve
from lora_align.evaluate.figures import Figures, figures, wins
from lora_align.evaluate.goals import GoalScore, score_of
from lora_align.evaluate.grid import Weights, grid, weights_text
from lora_align.evaluate.measure import Evaluator, Measurement
from lora_align.evaluate.sweep_result import SweepPolicy, SweepResult
from lora_align.metrics.intervals import Estimate
from lora_align.policy.policy import START, WANT, Policy, newest_conditioned
from lora_align.recipe import Recipe
from lora_align.runs import Manifest
from lora_align.want_direction import Want, sample_direction


@dataclass(frozen=True)
class SweepPlan:
    """The policies of a sweep: a grid of weights, sampled directions, and other policies.

    Each has the word that `eval` takes for it.
    """

    axes: Mapping[str, Sequence[float]]  # name of a weight → its values
    weights: Mapping[str, Weights]  # word of a policy on the grid → its weights
    wants: Mapping[str, Want] = field(default_factory=dict)  # word of a sampled direction → the direction
    lower: Mapping[str, bool] = field(default_factory=dict)  # objective → whether its weights are all at most 0
    others: Sequence[str] = ()
    rivals: Mapping[str, Mapping[float, str]] = field(default_factory=dict)  # word of a rival → scale → word

    @property
    def policies(self) -> list[str]:
        """Return the words of all policies; the start policy is first."""
        scaled = [word for words in self.rivals.values() for word in words.values()]
        return list(dict.fromkeys([START, *self.weights, *self.wants, *self.others, *scaled]))


def plan_sweep(
    axes: Sequence[str],
    directions: int,
    others: Sequence[str],
    runs_dir: Path,
    screen: Screen,
    against: Sequence[Policy] = (),
) -> SweepPlan:
    """Parse the axes, and sample directions of the newest conditioned policy. Scale the rivals in `against`.

    Directions are sampled uniformly from the trained region. For two objectives, more are sampled, and evenly spaced
    quantiles of their angles are used.
    """
    values, combined = grid(axes)
    weights = {weights_text(one): one for one in combined}
    weights.setdefault(START, dict.fromkeys(values, 0.0))
    rivals = {one.name: {scale: equal_kl.scaled(one, scale) for scale in equal_kl.SCALES} for one in against}
    if not directions:
        return SweepPlan(values, weights, others=others, rivals=rivals)
    region = newest_conditioned(runs_dir, "--directions", screen).manifest.recipe["rsf"]["directions"]
    draw = random.Random(0)
    wants = [sample_direction(region, draw) for _ in range(directions if len(region) > 2 else 50 * directions)]
    if len(region) == 2:
        wants.sort(key=lambda one: math.atan2(*one.weights.values()))
        wants = [wants[place * (len(wants) - 1) // max(directions - 1, 1)] for place in range(directions)]
    by_word = {
        f"{WANT}:{','.join(f'{name}={weight:.3f}' for name, weight in one.weights.items())}": one for one in wants
    }
    return SweepPlan(values, weights, by_word, {name: high <= 0 for name, (_, high) in region.items()}, others, rivals)


def run_sweep(
    plan: SweepPlan, evaluator: Evaluator, recipe: Recipe, target: Path, screen: Screen, *, force: bool = False
) -> SweepResult:
    """Measure every policy of the plan and publish the result. Cached measurements are reused."""
    with run_writer.staging_folder(target, screen, force=force) as staging:
        measurements = list(evaluator.measure_all(screen))
        figures_of = [figures(one) for one in measurements]
        scores = _scores(plan, figures_of, recipe)
        lower = {score.name for score in scores.values() if score.lower}
        compared = compare_rivals(plan, dict(zip(plan.policies, measurements, strict=True)))
        policies = [
            SweepPolicy(name, plan.weights.get(name), plan.wants.get(name), one, of, wins(one, measurements[0], lower))
            for name, one, of in zip(plan.policies, measurements, figures_of, strict=True)
        ]
        result = SweepResult.of(policies, scores, compared)
        write_tables(staging, list(plan.axes), policies)
        sweep_plots.draw(staging, plan.axes, scores, policies, plan.rivals)
        base = evaluator.base.identity
        sweep_report.write_report(staging, f"sweep {target.name}", base["model"], result, policies)
        manifest = Manifest(
            stage="sweep", base=base, recipe=recipe.as_dict(), method={"axes": plan.axes}, metrics=result.as_json()
        )
        run_writer.publish(staging, target, manifest)
    return result


def compare_rivals(plan: SweepPlan, measured: Mapping[str, Measurement]) -> list[AtEqualKL]:
    """Compare the policies on the only axis with each rival, at equal KL."""
    if not plan.rivals:
        return []
    [axis] = plan.axes
    ours = Curve.of(axis, {weights[axis]: measured[word] for word, weights in plan.weights.items()})
    compared = []
    for name, words in plan.rivals.items():
        rival = Curve.of(name, {0.0: measured[START], **{scale: measured[word] for scale, word in words.items()}})
        compared += equal_kl.compare_at_equal_kl(ours, rival)
    return compared


def _scores(plan: SweepPlan, figures_of: Sequence[Figures], recipe: Recipe) -> dict[str, GoalScore]:
    """Return the score of each axis and objective that has one."""
    names = list(dict.fromkeys(name for of in figures_of for name in of))
    rankers = {name: table.ranker for name, table in recipe.preferences.items() if not table.of}
    scores = {axis: score_of(axis, names, rankers.get(axis.partition("@")[0])) for axis in plan.axes}
    scores |= {name: score_of(name, names, lower=lower) for name, lower in plan.lower.items()}
    return {goal: score for goal, score in scores.items() if score}


def write_tables(folder: Path, axes: Sequence[str], policies: Sequence[SweepPolicy]) -> None:
    """Write the figures of every policy as points.csv and points.json, and all answers as answers.parquet."""
    names = list(dict.fromkeys(name for one in policies for name in one.figures))
    with (folder / "points.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        header = ["policy", *axes, *(f"{name}{end}" for name in names for end in ("", " low", " high"))]
        writer.writerow(map(_as_text, header))
        for one in policies:
            weights = [one.weights[axis] if one.weights else "" for axis in axes]
            cells = [_cells(one.figures.get(name)) for name in names]
            writer.writerow([_as_text(one.name), *weights, *itertools.chain.from_iterable(cells)])
    shards.write(
        [{"policy": one.name, **row} for one in policies for row in one.measurement.answers], folder / "answers.parquet"
    )
    rows = [
        {
            "policy": one.name,
            "weights": one.weights,
            "figures": {name: asdict(figure) for name, figure in one.figures.items()},
            "wins": {name: asdict(figure) for name, figure in one.wins.items()},
        }
        for one in policies
    ]
    (folder / "points.json").write_text(json.dumps(rows, indent=1))


def _as_text(cell: str) -> str:
    """Quote a cell that a spreadsheet would run as a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _cells(figure: Estimate | None) -> list[float | str]:
    return [figure.value, figure.low, figure.high] if figure else ["", "", ""]

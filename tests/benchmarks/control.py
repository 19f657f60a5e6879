"""Measure what a preference's weight does in the demo world: weights from -1 to 1, graded by the oracle.

Published figures use test prompts and data seeds that were not used while settings were chosen (`--development` uses
others). Runs and measurements are stored in --work, so that a stopped run continues where it stopped.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # many small jobs: one process a core is faster than one thread a core

from report import RESULTS, once, save

from lora_align import recipe, runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.console import Screen
from lora_align.demo import measurement, world
from lora_align.demo.oracle import AXES
from lora_align.metrics import plots
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.policy import vectors
from lora_align.rankers import Direction
from lora_align.train import dpo

WEIGHTS = [step / 4 for step in range(-4, 5)]
MIX = {"helpful": 1.0, "harmless": 1.0}
PROMPTS, SAMPLES = 200, 2
SEEDS, DEVELOPMENT_SEEDS = (104, 105, 106), (1, 2)  # 101 to 103 served an earlier run, whose settings fell short
SETTINGS_TRIED = 45  # combinations of rank, layers, optimizer, learning rate, β, pairs, margin and the base's sharpness


@dataclass(frozen=True)
class Bench:
    """Hold the work folder, the prompts' part, the seeds, the preferences and the overrides."""

    work: Path
    part: world.Part
    seeds: Sequence[int]
    preferences: Sequence[str]
    overrides: Sequence[str]

    def train(self, folder: str, preference: str, data: str, *more: str) -> None:
        """Train missing directions of a preference on these data."""
        overrides = [*self.overrides, f'preferences.{preference}.data="{data}"', *more]
        project = recipe.load(recipe.builtin()["demo"], overrides)
        target = self.work / folder
        missing = [side for side in Direction if not runs.is_run(target / "dpo" / preference / side.value)]
        if missing:
            dpo.train_dpo(project, [preference], missing, target, Screen(), resume=True)

    def vectors(self, kind: str, name: str) -> list[LoraDelta]:
        """Load a preference's vector from each data seed."""
        return [vectors.find(name, self.work / f"{kind}{seed}").load() for seed in self.seeds]


def trainings(bench: Bench) -> Iterator[tuple[str, ...]]:
    """Yield every training job: all preferences, and for two of them the controls of the agreement over seeds."""
    for seed in bench.seeds:
        data = f"demo:pairs?rows=8000&seed={seed}"
        for name in bench.preferences:
            yield f"seed{seed}", name, data
        for name in MIX if len(bench.seeds) > 1 else ():
            yield f"shuffled{seed}", name, f"{data}&noise=0.5"
            yield f"apart{seed}", name, data, f"lora.init_seed={seed}"


def turned(bench: Bench, seed: int, settings: Sequence[Mapping[str, float]], **options: Any) -> list[dict[str, Any]]:
    """Return the oracle's figures at each of these weights, with the vectors of one data seed."""
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    model = base.load()
    names = {name for weights in settings for name in weights}
    mixer = Mixer(model, {name: vectors.find(name, bench.work / f"seed{seed}").load() for name in names}, {})
    prompts = measurement.questions(seed, PROMPTS, part=bench.part, **options)
    figures = []
    for weights in settings:
        mixer.set(weights)
        figures.append(measurement.measure(model, base, prompts, SAMPLES).as_dict())
    return figures


def alone(bench: Bench, seed: int, name: str) -> dict[str, Any]:
    """Measure one preference of one data seed at every weight, and at both ends on held-out topics and phrasings."""
    ends = [{name: -1.0}, {name: 1.0}]
    return {
        "seen": turned(bench, seed, [{name: weight} for weight in WEIGHTS]),
        "held-out topics": turned(bench, seed, ends, topics="held out"),
        "held-out phrasings": turned(bench, seed, ends, new_asks=True),
    }


def together(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """Measure the start policy and the mix of two preferences."""
    return turned(bench, seed, [dict.fromkeys(MIX, 0.0), MIX])


def summary(name: str, bench: Bench, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise one preference over all seeds."""

    def by_seed(figure: str) -> list[list[float]]:
        return [[figures[figure] for figures in one["seen"]] for one in seeds]

    def curve(figure: str) -> list[float]:
        """Return the mean over the seeds at every weight."""
        return [mean(values) for values in zip(*by_seed(figure), strict=True)]

    own = curve(name)
    span = own[-1] - own[0]
    shares = {
        kind: mean(one[kind][1][name] - one[kind][0][name] for one in seeds) / span
        for kind in ("held-out topics", "held-out phrasings")
    }
    others = {other: (series := curve(other))[-1] - series[0] for other in AXES if other != name}
    return {
        "scores": _rounded(own),
        "scores by seed": by_seed(name),
        "spearman": round(spearman(WEIGHTS, own), 3),
        "span": round(span, 3),
        "share of the span kept on": {kind: round(share, 3) for kind, share in shares.items()},
        "span of the others": {other: round(moved, 3) for other, moved in others.items()},
        **{figure: _rounded(curve(figure)) for figure in ("well_formed", "safe_refused", "true_facts", "words")},
        "cos(pos, neg)": [round(_cosine(bench.work / f"seed{seed}", name), 3) for seed in bench.seeds],
        "cos over seeds": agreement(bench.vectors("seed", name)),
    }


def controls(bench: Bench, name: str) -> dict[str, list[float]]:
    """Return the controls of the agreement over data seeds: random labels, and an independent A for each run."""
    return {
        "labels drawn by lot": agreement(bench.vectors("shuffled", name)),
        "A initialised independently": agreement(bench.vectors("apart", name)),
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def _cosine(folder: Path, name: str) -> float:
    pos, neg = (peft_format.load(folder / "dpo" / name / side.value) for side in Direction)
    return pos.cosine(neg)


def agreement(updates: Sequence[LoraDelta]) -> list[float]:
    """Return the cosine of every pair."""
    return [round(a.cosine(b), 3) for a, b in itertools.combinations(updates, 2)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation. Means have no ties, so that ties are not handled."""
    count = len(first)
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (count * (count**2 - 1))


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Return the table of the results in Markdown."""
    yield "| preference | −1 | 0 | 1 | Spearman | held-out span | worst well-formed | cos(pos, neg) | cos over seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, own in figures["preferences"].items():
        low, middle, high = (f"{own['scores'][i]:.2f}" for i in (0, 4, 8))
        share = own["share of the span kept on"]["held-out topics"]
        agreed = f"{min(own['cos over seeds']):.2f}" if own["cos over seeds"] else ""
        yield (
            f"| {name} | {low} | {middle} | {high} | {own['spearman']:.2f} | {share:.0%} | "
            f"{min(own['well_formed']):.1%} | {max(own['cos(pos, neg)']):.2f} | {agreed} |"
        )


def main() -> None:
    """Train, measure at every weight, save and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--preferences", default=",".join(AXES))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    bench = Bench(
        work=options.work,
        part="dev" if options.development else "test",
        seeds=DEVELOPMENT_SEEDS if options.development else SEEDS,
        preferences=options.preferences.split(","),
        overrides=options.overrides,
    )
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_train, itertools.repeat(bench), trainings(bench)))
        jobs = [(seed, name) for seed in bench.seeds for name in (*bench.preferences, None)]
        results = dict(zip(jobs, pool.map(_measure, itertools.repeat(bench), jobs), strict=True))
    results_by_preference = {name: [results[seed, name] for seed in bench.seeds] for name in bench.preferences}
    starts, mixes = zip(*(results[seed, None] for seed in bench.seeds), strict=True)
    figures: dict[str, Any] = {
        "settings tried": SETTINGS_TRIED,
        "prompts": f"{PROMPTS} safe and {PROMPTS} risky of part {bench.part}, {SAMPLES} samples each at temperature 1",
        "data seeds": list(bench.seeds),
        "weights": WEIGHTS,
        "preferences": {name: summary(name, bench, results_by_preference[name]) for name in bench.preferences},
        "start": _means(starts),
        "mix": {"weights": MIX, "mean": _means(mixes), "by seed": mixes},
    }
    if len(bench.seeds) > 1:
        figures["controls"] = {name: controls(bench, name) for name in MIX}
    print("\n".join(lines(figures)))
    print("start", figures["start"], "\nmix", figures["mix"]["mean"])
    if not options.development:
        save("control", figures)
        draw(figures, bench)


def _train(bench: Bench, job: tuple[str, ...]) -> None:
    bench.train(*job)


def _measure(bench: Bench, job: tuple[int, str | None]) -> Any:
    seed, name = job
    if name is None:
        return once(bench.work, f"seed{seed}-mix", lambda: together(bench, seed))
    return once(bench.work, f"seed{seed}-{name}", lambda: alone(bench, seed, name))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {figure: round(mean(row[figure] for row in rows), 3) for figure in rows[0]}


def draw(figures: Mapping[str, Any], bench: Bench) -> None:
    """Plot the curves of all preferences."""
    plots.control_curves(
        RESULTS / "control.png",
        WEIGHTS,
        {name: figures["preferences"][name]["scores by seed"] for name in bench.preferences},
        {name: figures["preferences"][name]["well_formed"] for name in bench.preferences},
    )


if __name__ == "__main__":
    main()

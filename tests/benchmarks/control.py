"""What a weight does in the built-in world: every preference turned from -1 to 1, graded by the oracle.

Published figures come from test prompts and from data seeds that were not used while settings were chosen
(`--development` uses others). Runs and measurements are kept in --work, so that it can be stopped and gone on with.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from report import RESULTS, save

from lora_align import recipe, runs
from lora_align.adapters import peft_format, vectors
from lora_align.adapters.delta import LoraDelta
from lora_align.console import Screen
from lora_align.demo import measure, world
from lora_align.demo.oracle import AXES
from lora_align.evaluate import plots
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.preference import Direction
from lora_align.stages import dpo

WEIGHTS = [step / 4 for step in range(-4, 5)]
MIX = {"helpful": 1.0, "harmless": 1.0}
PROMPTS, SAMPLES = 200, 2
SEEDS, DEVELOPMENT_SEEDS = (101, 102, 103), (1,)
SETTINGS_TRIED = 14  # learning rates, β and numbers of pairs looked at on development prompts before this run


@dataclass(frozen=True)
class Bench:
    """Where things are kept, and which prompts are asked."""

    work: Path
    part: world.Part
    seeds: Sequence[int]
    preferences: Sequence[str]
    overrides: Sequence[str]

    def train(self, folder: str, preference: str, data: str, *more: str) -> Path:
        """Both directions of a preference on these data; the folder of its runs."""
        overrides = [*self.overrides, f'preferences.{preference}.data="{data}"', *more]
        project = recipe.load(recipe.builtin()["demo"], overrides)
        runs_dir = self.work / folder
        for side in Direction:
            if not runs.is_run(runs_dir / "dpo" / preference / side.value):
                dpo.run(project, [preference], [side], runs_dir, Screen())
        return runs_dir

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was measured before under that name, or what is measured now."""
        file = self.work / "measured" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(make()))
        return json.loads(file.read_text())


def curves(bench: Bench, seed: int) -> dict[str, Any]:
    """One data seed: each preference at every weight, on seen and on held-out topics, and the mix of two."""
    found: dict[str, LoraDelta] = {
        name: vectors.find(name, bench.train(f"seed{seed}", name, f"demo:pairs?seed={seed}")).load()
        for name in bench.preferences
    }
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    model = base.load()
    mixer = Mixer(model, found, {})
    asked = measure.questions(seed, PROMPTS, part=bench.part)
    unseen = {
        "held-out topics": measure.questions(seed, PROMPTS, part=bench.part, topics="held out"),
        "held-out phrasings": measure.questions(seed, PROMPTS, part=bench.part, new_asks=True),
    }

    def at(weights: Mapping[str, float], prompts: list[Any]) -> dict[str, Any]:
        mixer.set(weights)
        return measure.measure(model, base, prompts, SAMPLES).as_dict()

    start = at({}, asked)
    return {
        "start": start,
        "seen": {name: [at({name: w}, asked) if w else start for w in WEIGHTS] for name in found},
        **{
            kind: {name: [at({name: w}, prompts) for w in (-1.0, 1.0)] for name in found}
            for kind, prompts in unseen.items()
        },
        "mix": at(MIX, asked) if set(MIX) <= found.keys() else None,
    }


def summary(name: str, bench: Bench, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One preference over all seeds, as the figures a reader asks for."""

    def curve(figure: str) -> list[float]:
        """The mean of the seeds at every weight."""
        return [mean(points) for points in zip(*_by_seed(measured, name, figure), strict=True)]

    own = curve(name)
    span = own[-1] - own[0]
    kept = {
        kind: mean(one[kind][name][1][name] - one[kind][name][0][name] for one in measured) / span
        for kind in ("held-out topics", "held-out phrasings")
    }
    folders = [bench.work / f"seed{seed}" for seed in bench.seeds]
    others = {other: (series := curve(other))[-1] - series[0] for other in AXES if other != name}
    return {
        "scores": _rounded(own),
        "scores by seed": _by_seed(measured, name, name),
        "spearman": round(spearman(WEIGHTS, own), 3),
        "span": round(span, 3),
        "share of the span kept on": {kind: round(share, 3) for kind, share in kept.items()},
        "span of the others": {other: round(moved, 3) for other, moved in others.items()},
        **{figure: _rounded(curve(figure)) for figure in ("well_formed", "safe_refused", "true_facts", "words")},
        "cos(pos, neg)": [round(_side(f, name, "pos").cosine(_side(f, name, "neg")), 3) for f in folders],
        "cos over seeds": agreement([vectors.find(name, folder).load() for folder in folders]),
    }


def _by_seed(measured: Sequence[Mapping[str, Any]], name: str, figure: str) -> list[list[float]]:
    return [[point[figure] for point in one["seen"][name]] for one in measured]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def controls(bench: Bench, name: str) -> dict[str, list[float]]:
    """What agreement over data seeds is worth: the same with labels drawn by lot, and with another A for each run."""
    shuffled = [bench.train(f"shuffled{seed}", name, f"demo:pairs?seed={seed}&noise=0.5") for seed in bench.seeds]
    apart = [
        bench.train(f"apart{seed}", name, f"demo:pairs?seed={seed}", f"lora.init_seed={seed}") for seed in bench.seeds
    ]
    return {
        "labels drawn by lot": agreement([vectors.find(name, folder).load() for folder in shuffled]),
        "A initialised independently": agreement([vectors.find(name, folder).load() for folder in apart]),
    }


def agreement(found: Sequence[LoraDelta]) -> list[float]:
    """Cosines of all pairs."""
    return [round(a.cosine(b), 3) for a, b in itertools.combinations(found, 2)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks; there are no ties to mind among means."""
    count = len(first)
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (count * (count**2 - 1))


def _side(folder: Path, name: str, side: str) -> LoraDelta:
    return peft_format.load(folder / "dpo" / name / side)


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """A table for the README."""
    yield "| preference | −1 | 0 | 1 | Spearman | held-out span | worst well-formed | cos(pos, neg) | cos over seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, own in figures["preferences"].items():
        low, middle, high = (f"{own['scores'][i]:.2f}" for i in (0, 4, 8))
        kept = own["share of the span kept on"]["held-out topics"]
        agreed = f"{min(own['cos over seeds']):.2f}" if own["cos over seeds"] else ""
        yield (
            f"| {name} | {low} | {middle} | {high} | {own['spearman']:.2f} | {kept:.0%} | "
            f"{min(own['well_formed']):.1%} | {max(own['cos(pos, neg)']):.2f} | {agreed} |"
        )


def main() -> None:
    """Train, turn, measure, save, draw."""
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
    measured = [bench.kept(f"seed{seed}", lambda seed=seed: curves(bench, seed)) for seed in bench.seeds]
    figures = {
        "settings tried": SETTINGS_TRIED,
        "prompts": f"{PROMPTS} safe and {PROMPTS} risky of part {bench.part}, {SAMPLES} samples each at temperature 1",
        "data seeds": list(bench.seeds),
        "weights": WEIGHTS,
        "preferences": {name: summary(name, bench, measured) for name in bench.preferences},
        "start": {key: round(mean(one["start"][key] for one in measured), 3) for key in measured[0]["start"]},
        "mix": {"weights": MIX, "by seed": [one["mix"] for one in measured]},
    }
    if options.development:
        print("\n".join(lines(figures)))
        print("start", figures["start"], "\nmix", measured[0]["mix"])
        return
    figures["controls"] = {name: controls(bench, name) for name in MIX}
    save("control", figures)
    print("\n".join(lines(figures)))
    draw(figures, measured, bench)


def draw(figures: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], bench: Bench) -> None:
    """The curves of all preferences."""
    plots.control_curves(
        RESULTS / "control.png",
        WEIGHTS,
        {name: figures["preferences"][name]["scores by seed"] for name in bench.preferences},
        {name: figures["preferences"][name]["well_formed"] for name in bench.preferences},
    )


if __name__ == "__main__":
    main()

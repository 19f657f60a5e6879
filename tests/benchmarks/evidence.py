"""Both papers in miniature, on the built-in world: `just evidence`. Trains, measures, and writes evidence/README.md.

Three data seeds; the oracle grades answers to test prompts that nothing was chosen by. What --work holds already is not
made again, also when it comes from `control.py` or `composition.py`. A process a core, a thread each.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import composition
import fronts
import modpo
import rloo
import tune
from control import PROMPTS, SEEDS
from methods import Way
from report import once

from lora_align import recipe, runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta, total
from lora_align.console import Screen
from lora_align.data import forms, sources
from lora_align.demo import measurement, oracle, oracle_judge, world
from lora_align.demo.oracle import AXES
from lora_align.evaluate.measure import facts_known
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.policy import vectors
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.train import dpo, reward

PAIR = ("helpful", "harmless")
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
FAR = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
NOISES = (0.15, 0.3, 0.5)  # how often a label is exchanged; .5 is drawing by lot
REWARD_NOISES = (0.0, 0.3)
CORRELATED = ("helpful", "polite")
REACHED = (*PAIR, "brief")
CORRELATIONS = (-0.8, -0.4, 0.0, 0.4, 0.8)
ASKED_OF_RLOO = {"pos": {"helpful": 1.0}, "neg": {"helpful": -1.0}, "both": {"helpful": 1.0, "harmless": 1.0}}
Answers = dict[str, list[float | None]]  # a figure of every prompt's answer; None where it has none
Job = tuple[str, Callable[[], Any]]


# --- what is trained ---


def world_of(seed: int, *more: str, **options: object) -> Recipe:
    """The demo's recipe on pairs of one data seed."""
    query = "&".join(f"{key}={value}" for key, value in {"rows": 8000, "seed": seed, **options}.items())
    data = [f'preferences.{name}.data="demo:pairs?{query}"' for name in AXES]
    return recipe.load(recipe.builtin()["demo"], [*data, *more])


def adapters(work: Path, folder: str, preference: str, project: Recipe, sides: Sequence[Direction]) -> None:
    """A preference's adapters, unless they are there."""
    missing = [side for side in sides if not runs.is_run(work / folder / "dpo" / preference / side.value)]
    if missing:
        dpo.train_dpo(project, [preference], missing, work / folder, Screen(quiet=True), resume=True)


def trainings(work: Path) -> Iterator[Job]:
    """Vectors of every preference, and those that some item compares them with."""
    both = list(Direction)
    for seed in SEEDS:
        plain = world_of(seed)
        for name in composition.ORDER:
            yield f"seed{seed} {name}", partial(adapters, work, f"seed{seed}", name, plain, both)
        joint = world_of(seed, f"preferences.joint.of={json.dumps(PAIR)}")
        yield f"seed{seed} joint", partial(adapters, work, f"seed{seed}", "joint", joint, [Direction.pos])
        apart = world_of(seed, f"lora.init_seed={seed}")
        yield f"apart{seed}", partial(adapters, work, f"apart{seed}", "helpful", apart, both)
        for noise in NOISES:
            noisy = world_of(seed, noise=noise)
            yield f"noise{noise} {seed}", partial(adapters, work, f"noise{noise}-{seed}", "helpful", noisy, both)
        for strength in filter(None, CORRELATIONS):
            together = world_of(seed, correlate=f"helpfulness,politeness,{strength}")
            for name in CORRELATED:
                folder = f"correlated{strength}-{seed}"
                yield f"{folder} {name}", partial(adapters, work, folder, name, together, both)


def rewarded(work: Path, seed: int, noise: float) -> dict[str, float]:
    """A reward model from the pairs that vectors learn from, and what RLOO makes of it; seconds for each."""
    heads = [f"reward.pairs={{{', '.join(f'{name}={json.dumps(name)}' for name in PAIR)}}}", "reward.ratings={}"]
    project = world_of(seed, *heads, "reward.limit=1200", noise=noise)
    folder = work / f"rloo{noise}-{seed}"
    seconds = {
        "reward": reward.train_reward_model(project, folder, Screen(quiet=True), force=True).manifest.metrics["seconds"]
    }
    safe, risky = (world.prompts(seed, risky=is_risky) for is_risky in (False, True))
    count = rloo.STEPS * rloo.PROMPTS // 2
    prompts = [next(some).text for some in itertools.chain(*zip([safe] * count, [risky] * count, strict=True))]
    for label, wanted in ASKED_OF_RLOO.items():
        if label != "both" or not noise:
            seconds[label] = rloo.train(project, folder / "reward" / reward.NAME, wanted, prompts, folder / label)
    return seconds


def margined(work: Path, seed: int) -> float:
    """MODPO on the pairs of the first of two preferences, the second's adapter beside it; seconds."""
    own, other = PAIR
    folder = work / f"seed{seed}"
    return modpo.train(world_of(seed), own, folder / "dpo" / other / Direction.pos.value, folder / "modpo")


# --- what is measured ---


class Examiner:
    """One seed's test prompts, put to the base under any update."""

    def __init__(self, seed: int) -> None:
        self.base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
        self.model = self.base.load()
        self.prompts = measurement.questions(seed, PROMPTS, part="test")

    def __call__(self, update: LoraDelta) -> Answers:
        """The oracle's figures of an answer to each prompt."""
        mixer = Mixer(self.model, {"mix": update}, {"mix": 1.0})
        answered = measurement.answers(self.model, self.base, self.prompts, 1, seed=0)
        mixer.remove()
        rows = [_figures(prompt, text) for prompt, (text,) in zip(self.prompts, answered, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def known(self, update: LoraDelta) -> list[float]:
        """Of every fact, whether it is found likelier of its subject than three that are true of others alone."""
        mixer = Mixer(self.model, {"mix": update}, {"mix": 1.0})
        hits = facts_known(
            self.model, self.base, [forms.fact(row, where) for where, row in sources.rows_or_raise("demo:facts")]
        )
        mixer.remove()
        return [float(bool(one)) for one in hits]


def _figures(prompt: oracle.Prompt, text: str) -> dict[str, float | None]:
    read = oracle.score(prompt, text)
    refused = None if prompt.risky else float(read.refused)
    return {**oracle_judge.grades(prompt, read), "refused": refused, "words": float(read.words)}


def mixed(work: Path, folder: str, weights: Mapping[str, float]) -> LoraDelta:
    """Vectors, added."""
    scaled = [vectors.find(name, work / folder).load() * weight for name, weight in weights.items() if weight]
    return total([LoraDelta(()), *scaled])


def policy(work: Path, folder: str, preference: str) -> LoraDelta:
    """One adapter, towards."""
    return peft_format.load(work / folder / "dpo" / preference / "pos", whole=True)


def grid(work: Path, seed: int) -> dict[str, Answers]:
    """Both weights from -1 to 1."""
    examine = Examiner(seed)
    points = itertools.product(STEPS, STEPS)
    return {
        f"{x:g},{y:g}": examine(mixed(work, f"seed{seed}", dict(zip(PAIR, (x, y), strict=True)))) for x, y in points
    }


def rivals(work: Path, seed: int) -> dict[str, Answers]:
    """Everything that is to be helpful and harmless at once."""
    examine, folder = Examiner(seed), f"seed{seed}"
    return {
        "start": examine(LoraDelta(())),
        "vectors": examine(mixed(work, folder, dict.fromkeys(PAIR, 1.0))),
        "joint DPO": examine(policy(work, folder, "joint")),
        "soup": examine(Way("soup").mixed(work / folder, PAIR)[0]),
        "MODPO": examine(peft_format.load(work / folder / "modpo", whole=True)),
        "positive alone": examine(total([policy(work, folder, name) for name in PAIR])),
        "RLOO": examine(peft_format.load(work / f"rloo0.0-{seed}" / "both", whole=True)),
    }


def later(work: Path, seed: int) -> dict[str, Answers]:
    """Two preferences, a third and a fourth added; and the new ones alone."""
    examine = Examiner(seed)
    sets = [PAIR, (*PAIR, "polite"), (*PAIR, "brief"), (*PAIR, "polite", "brief"), ("polite",), ("brief",), ()]
    return {" ".join(names): examine(mixed(work, f"seed{seed}", dict.fromkeys(names, 1.0))) for names in sets}


def far(work: Path, seed: int) -> dict[str, Any]:
    """Both vectors, turned further than training went."""
    examine = Examiner(seed)
    updates = {f"{eta:g}": mixed(work, f"seed{seed}", dict.fromkeys(PAIR, eta)) for eta in FAR}
    return {eta: {**examine(update), "known": examine.known(update)} for eta, update in updates.items()}


def reached(work: Path, seed: int) -> dict[str, Any]:
    """How far three vectors go, each and every two, and how straight their margins are."""
    data = [f'preferences.{name}.data="demo:pairs?rows=8000&seed={seed}"' for name in AXES]
    words = ["--runs", str(work / f"seed{seed}"), "--force", *(word for one in data for word in ("--set", one))]
    printed, _ = tune.command(work, "reach", *REACHED, *words)
    return {name: printed[name] for name in ("alone", "together", "limits")}


def tuned(work: Path, seed: int) -> dict[str, Any]:
    """Weights by gradient beside a grid's best, for every set of aims."""
    return {tune.aims_text(aims): tune.compared(seed, aims, work / "tune") for aims in tune.AIMS}


def correlated(work: Path, seed: int, strength: float) -> dict[str, Answers]:
    """Two preferences from pairs in which they go together, or against each other."""
    examine, folder = Examiner(seed), f"correlated{strength}-{seed}" if strength else f"seed{seed}"
    return {
        f"{name} {weight:g}": examine(mixed(work, folder, {name: weight})) for name in CORRELATED for weight in (-1, 1)
    }


# --- users who want different things ---


def users(work: Path, seed: int) -> dict[str, float]:
    """What one DPO answers whose pairs are labelled by what three users want on the average."""
    bench = fronts.Bench(work=work / "fronts", part="test", seeds=fronts.SEEDS, overrides=())
    wanted = [fronts.directions(bench.project(seed))[place] for place in USERS.values()]
    file = bench.runs(seed) / "average.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(_labelled(row, wanted)) + "\n" for row in world.pairs(seed, 8000, risky=0))
        file.with_suffix(".unfinished").write_text(rows)
        file.with_suffix(".unfinished").rename(file)
    project = bench.project(seed, f'preferences.average={{data="{file}", rank="rating:average", margin=1.0}}')
    adapters(bench.work, f"seed{seed}", "average", project, [Direction.pos])
    base = bases.find(project.base)
    model = base.load()
    Mixer(model, {"average": policy(bench.work, f"seed{seed}", "average")}, {"average": 1.0})
    prompts = [prompt for prompt in measurement.questions(seed, fronts.PROMPTS, part="test") if not prompt.risky]
    answered = measurement.answers(model, base, prompts, fronts.SAMPLES, seed)
    read = [oracle.score(prompt, text) for prompt, texts in zip(prompts, answered, strict=True) for text in texts]
    formed = [score for score in read if score.well_formed]
    figures = {name: mean(score.grades[name] for score in formed) for name in fronts.OBJECTIVES}
    return {**figures, "well-formed": len(formed) / len(read)}


USERS = {"all the help": 0, "in between": 5, "few words": 9}  # who they are, by the directions of `fronts`


def _labelled(row: Mapping[str, Any], wanted: Sequence[Any]) -> dict[str, Any]:
    """A pair with what its answers are worth to the users on the average."""
    worth = {
        f"average_{side}": sum(
            want.value({name: row[f"{name}_{side}"] for name in fronts.OBJECTIVES}) for want in wanted
        )
        / len(wanted)
        for side in (0, 1)
    }
    return {**{name: row[name] for name in ("prompt", "response_0", "response_1")}, **worth}


def jobs(work: Path) -> list[list[Job]]:
    """What is to be done, in rounds that need those before. Long ones begin: nobody is to wait at the end."""
    first: list[Job] = [
        *((f"fronts {s}", partial(compare_fronts, work, "--only", str(s))) for s in fronts.SEEDS),
        *((f"tune {s}", partial(tuned, work, s)) for s in tune.SEEDS),
        *((f"rloo {noise} {s}", partial(rewarded, work, s, noise)) for s in SEEDS for noise in REWARD_NOISES),
        *trainings(work),
    ]
    second: list[Job] = [(f"reached {seed}", partial(reached, work, seed)) for seed in SEEDS]
    second += [(f"composed {seed}", partial(composition.measured, work, seed)) for seed in SEEDS]
    second += [(f"users {s}", partial(users, work, s)) for s in fronts.SEEDS]
    second += [(f"modpo {seed}", partial(margined, work, seed)) for seed in SEEDS]
    for seed in SEEDS:
        second += [(f"{item.__name__} {seed}", partial(item, work, seed)) for item in (grid, far, later)]
        second += [(f"interference {seed}", partial(composition.interference, work, seed))]
        second += [(f"correlated {r} {seed}", partial(correlated, work, seed, r)) for r in CORRELATIONS]
    return [first, second, [(f"rivals {seed}", partial(rivals, work, seed)) for seed in SEEDS]]


def compare_fronts(work: Path, *words: str) -> None:
    """The benchmark of that name, in a folder of its own; it goes on where it was."""
    line = [sys.executable, str(Path(fronts.__file__)), "--work", str(work / "fronts"), *words]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def done(work: Path, name: str, job: Callable[[], Any]) -> tuple[str, float]:
    """A job, and its seconds the first time."""

    def timed() -> dict[str, Any]:
        began = time.perf_counter()
        result = job()
        return {"seconds": round(time.perf_counter() - began, 1), "found": result}

    return name, once(work, name, timed)["seconds"]


def main() -> None:
    """Train, measure, tell."""
    import evidence_page  # which reads what was measured here

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench/evidence"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = options.work.resolve()
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    began, anew = time.perf_counter(), not (work.exists() and any(work.iterdir()))
    seconds = {}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for round_ in jobs(work):
            for name, took in [future.result() for future in [pool.submit(done, work, *job) for job in round_]]:
                seconds[name] = took
                print(f"{name}: {took:.0f} s", flush=True)
    compare_fronts(work)  # all of it is measured: what is left is to compare, and to publish
    all_took = {"processes": options.processes, "seconds": round(time.perf_counter() - began)}
    in_one_go = once(work, "in one go", lambda: all_took if anew else None)
    evidence_page.write(work, seconds, in_one_go)


if __name__ == "__main__":
    main()

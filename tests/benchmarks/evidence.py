"""Reproduce both papers in miniature in the demo world (`just evidence`): train, measure and write evidence/README.md.

There are three data seeds. The oracle grades answers to test prompts that chose no setting. Results stored in --work
are not computed again, including those of `control.py` and `composition.py`. One process runs on each core, with one
thread.
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
from lora_align.data import row_reader, sources
from lora_align.demo import measurement, oracle, oracle_judge, world
from lora_align.demo.oracle import AXES
from lora_align.evaluate.measure import facts_known
from lora_align.model import base as bases
from lora_align.model.logprobs import TOKENS, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.policy import vectors
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.train import dpo, reward

PAIR = ("helpful", "harmless")
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
FAR = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
NOISES = (0.15, 0.3, 0.5)  # share of labels that are swapped; at 0.5 labels are random
REWARD_NOISES = (0.0, 0.3)
CORRELATED = ("helpful", "polite")
REACHED = (*PAIR, "brief")
CORRELATIONS = (-0.8, -0.4, 0.0, 0.4, 0.8)
ASKED_OF_RLOO = {"pos": {"helpful": 1.0}, "neg": {"helpful": -1.0}, "both": {"helpful": 1.0, "harmless": 1.0}}
Answers = dict[str, list[float | None]]  # one value for each prompt's answer; None where the answer has none
Job = tuple[str, Callable[[], Any]]


# --- training ---


def world_of(seed: int, *more: str, **options: object) -> Recipe:
    """Load the demo's recipe with pairs of one data seed."""
    query = "&".join(f"{key}={value}" for key, value in {"rows": 8000, "seed": seed, **options}.items())
    data = [f'preferences.{name}.data="demo:pairs?{query}"' for name in AXES]
    return recipe.load(recipe.builtin()["demo"], [*data, *more])


def adapters(work: Path, folder: str, preference: str, project: Recipe, sides: Sequence[Direction]) -> None:
    """Train the missing adapters of a preference."""
    missing = [side for side in sides if not runs.is_run(work / folder / "dpo" / preference / side.value)]
    if missing:
        dpo.train_dpo(project, [preference], missing, work / folder, Screen(quiet=True), resume=True)


def trainings(work: Path) -> Iterator[Job]:
    """Yield training jobs: vectors of every preference, and the adapters that some items compare them with."""
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
    """Train a reward model on the vectors' pairs and RLOO policies by its scores; return the seconds of each."""
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
    """Train MODPO on the pairs of the first of two preferences, with the second's adapter; return the seconds."""
    own, other = PAIR
    folder = work / f"seed{seed}"
    return modpo.train(world_of(seed), own, folder / "dpo" / other / Direction.pos.value, folder / "modpo")


# --- measurement ---


class Examiner:
    """Answer one seed's test prompts with the base under any update."""

    def __init__(self, seed: int) -> None:
        self.base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
        self.model = self.base.load()
        self.prompts = measurement.questions(seed, PROMPTS, part="test")

    def __call__(self, update: LoraDelta) -> Answers:
        """Return the oracle's figures of one answer to each prompt."""
        mixer = Mixer(self.model, {"mix": update}, {"mix": 1.0})
        answered = measurement.answers(self.model, self.base, self.prompts, 1, seed=0)
        mixer.remove()
        rows = [_figures(prompt, text) for prompt, (text,) in zip(self.prompts, answered, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def known(self, update: LoraDelta) -> list[float]:
        """Return for every fact whether it is likelier for its subject than three facts of other subjects."""
        mixer = Mixer(self.model, {"mix": update}, {"mix": 1.0})
        facts = [row_reader.fact(row, where) for where, row in sources.rows_or_raise("demo:facts")]
        budget = MemoryBudget(TOKENS)
        hits = facts_known(self.base, facts, "", lambda rows, _: answer_logprobs(self.model, rows, budget))
        mixer.remove()
        return [float(bool(one)) for one in hits]


def _figures(prompt: oracle.Prompt, text: str) -> dict[str, float | None]:
    read = oracle.score(prompt, text)
    refused = None if prompt.risky else float(read.refused)
    return {**oracle_judge.grades(prompt, read), "refused": refused, "words": float(read.words)}


def mixed(work: Path, folder: str, weights: Mapping[str, float]) -> LoraDelta:
    """Return the weighted sum of vectors."""
    scaled = [vectors.find(name, work / folder).load() * weight for name, weight in weights.items() if weight]
    return total([LoraDelta(()), *scaled])


def policy(work: Path, folder: str, preference: str) -> LoraDelta:
    """Load a preference's positive adapter."""
    return peft_format.load(work / folder / "dpo" / preference / "pos", whole=True)


def grid(work: Path, seed: int) -> dict[str, Answers]:
    """Answer at every point of the grid of both weights, from -1 to 1."""
    examine = Examiner(seed)
    points = itertools.product(STEPS, STEPS)
    return {
        f"{x:g},{y:g}": examine(mixed(work, f"seed{seed}", dict(zip(PAIR, (x, y), strict=True)))) for x, y in points
    }


def rivals(work: Path, seed: int) -> dict[str, Answers]:
    """Answer with every policy that is compared on being helpful and harmless at once."""
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
    """Answer with two preferences, with a third and a fourth added, and with the new ones alone."""
    examine = Examiner(seed)
    sets = [PAIR, (*PAIR, "polite"), (*PAIR, "brief"), (*PAIR, "polite", "brief"), ("polite",), ("brief",), ()]
    return {" ".join(names): examine(mixed(work, f"seed{seed}", dict.fromkeys(names, 1.0))) for names in sets}


def far(work: Path, seed: int) -> dict[str, Any]:
    """Answer with both vectors at weights beyond the range of training, and test which facts are known."""
    examine = Examiner(seed)
    updates = {f"{eta:g}": mixed(work, f"seed{seed}", dict.fromkeys(PAIR, eta)) for eta in FAR}
    return {eta: {**examine(update), "known": examine.known(update)} for eta, update in updates.items()}


def reached(work: Path, seed: int) -> dict[str, Any]:
    """Run `reach` on three vectors: limits alone and in pairs, and how linear their margins are."""
    data = [f'preferences.{name}.data="demo:pairs?rows=8000&seed={seed}"' for name in AXES]
    words = ["--runs", str(work / f"seed{seed}"), "--force", *(word for one in data for word in ("--set", one))]
    printed, _ = tune.command(work, "reach", *REACHED, *words)
    return {name: printed[name] for name in ("alone", "together", "limits")}


def tuned(work: Path, seed: int) -> dict[str, Any]:
    """Compare `tune` with the grid's best point, for every set of aims."""
    return {tune.aims_text(aims): tune.compared(seed, aims, work / "tune") for aims in tune.AIMS}


def correlated(work: Path, seed: int, strength: float) -> dict[str, Answers]:
    """Answer with two preferences whose training pairs correlate, positively or negatively."""
    examine, folder = Examiner(seed), f"correlated{strength}-{seed}" if strength else f"seed{seed}"
    return {
        f"{name} {weight:g}": examine(mixed(work, folder, {name: weight})) for name in CORRELATED for weight in (-1, 1)
    }


# --- users with different preferences ---


def users(work: Path, seed: int) -> dict[str, float]:
    """Grade one DPO policy whose pairs are labelled by three users' average preference."""
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


USERS = {"all the help": 0, "in between": 5, "few words": 9}  # each user's index in the directions of `fronts`


def _labelled(row: Mapping[str, Any], wanted: Sequence[Any]) -> dict[str, Any]:
    """Return a pair with each answer's average value to the users."""
    worth = {
        f"average_{side}": sum(
            want.value({name: row[f"{name}_{side}"] for name in fronts.OBJECTIVES}) for want in wanted
        )
        / len(wanted)
        for side in (0, 1)
    }
    return {**{name: row[name] for name in ("prompt", "response_0", "response_1")}, **worth}


def jobs(work: Path) -> list[list[Job]]:
    """Return the jobs in rounds: a round needs the rounds before. Long jobs come first."""
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
    """Run `fronts.py` in a folder of its own, where it continues an earlier run."""
    line = [sys.executable, str(Path(fronts.__file__)), "--work", str(work / "fronts"), *words]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def done(work: Path, name: str, job: Callable[[], Any]) -> tuple[str, float]:
    """Run a job, or read its stored result; return its name and the seconds of its first run."""

    def timed() -> dict[str, Any]:
        began = time.perf_counter()
        result = job()
        return {"seconds": round(time.perf_counter() - began, 1), "found": result}

    return name, once(work, name, timed)["seconds"]


def main() -> None:
    """Train, measure and write the page."""
    import evidence_page  # imported here: it reads results of this module

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
    compare_fronts(work)  # all measurements are stored: compare and publish
    all_took = {"processes": options.processes, "seconds": round(time.perf_counter() - began)}
    in_one_go = once(work, "in one go", lambda: all_took if anew else None)
    evidence_page.write(work, seconds, in_one_go)


if __name__ == "__main__":
    main()

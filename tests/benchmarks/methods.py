"""Mix four preferences by every merge method at its defaults, and measure how much of its gain alone each retains.

Uses the runs of `control.py`, whose --work is passed, and trains missing ones. The oracle grades answers to test
prompts. No setting is chosen by these figures: weights are 1, and a quarter each for a soup, whose weights add up to 1.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from control import PROMPTS, SAMPLES, SEEDS, Bench
from report import once, save

from lora_align import recipe
from lora_align.adapters.delta import LoraDelta
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.streamed_merge import Merge, Tally
from lora_align.demo import measurement
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.policy import vectors

MIXED = ("helpful", "harmless", "polite", "brief")


@dataclass(frozen=True)
class Way:
    """Hold a merge method, and the rank of its result if the result is truncated."""

    method: str
    rank: int | None = None

    @property
    def label(self) -> str:
        """Return the method as it is typed on the command line."""
        return self.method + (f" --rank {self.rank}" if self.rank else "")

    def mixed(self, folder: Path, names: Sequence[str] = MIXED) -> tuple[LoraDelta, Tally]:
        """Merge preferences into one update."""
        by_name = {name: vectors.find(name, folder) for name in names}
        of_policies = METHODS[self.method].of_policies
        if of_policies:
            by_name = {name: vector.policy() for name, vector in by_name.items()}
        weight = 1 / len(names) if of_policies else 1.0
        job = Merge(
            {name: vector.load() for name, vector in by_name.items()}, dict.fromkeys(names, weight), self.method
        )
        tally = Tally()
        return LoraDelta.of(dict(tally.counted(job.modules(self.rank)))), tally


WAYS = [Way("exact"), Way("exact", 16), Way("svd"), Way("soup"), Way("tsv"), Way("ties"), Way("dare")]


def grader(seed: int, samples: int) -> Callable[[LoraDelta], dict[str, Any]]:
    """Return a function that grades answers to that seed's prompts by the oracle, given an update of the base."""
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    prompts = measurement.questions(seed, PROMPTS, part="test")
    model = base.load()

    def graded(update: LoraDelta) -> dict[str, Any]:
        mixer = Mixer(model, {"mix": update}, {"mix": 1.0})
        figures = measurement.measure(model, base, prompts, samples).as_dict()
        mixer.remove()
        return figures

    return graded


def measured(work: Path, seed: int) -> dict[str, Any]:
    """Grade the start policy, each preference alone, and every merge method, with the vectors of one data seed."""
    folder = work / f"seed{seed}"
    graded = grader(seed, SAMPLES)
    figures: dict[str, Any] = {"start": graded(LoraDelta(()))}
    figures |= {name: graded(vectors.find(name, folder).load()) for name in MIXED}
    for way in WAYS:
        update, tally = way.mixed(folder)
        figures[way.label] = {**graded(update), "rank": tally.rank, "left out": tally.left_out, "norm": update.norm()}
    return figures


def summary(seeds: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """Summarise one method over the seeds: the share of its gain alone that each preference retains, and the cost."""

    def share_kept(one: dict[str, Any], name: str) -> float:
        start = one["start"][name]
        return float((one[label][name] - start) / (one[name][name] - start))

    shares = {name: [round(share_kept(one, name), 3) for one in seeds] for name in MIXED}
    means = {name: round(mean(values), 3) for name, values in shares.items()}
    others = ("well_formed", "safe_refused", "norm", "left out", "rank")
    return {
        "kept": means,
        "least kept": min(means.values()),
        "kept by seed": shares,
        **{name: round(mean(one[label][name] for one in seeds), 4) for name in others},
    }


def main() -> None:
    """Train missing vectors, mix them, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    bench = Bench(work=work, part="test", seeds=SEEDS, preferences=MIXED, overrides=())
    for seed in SEEDS:
        for name in MIXED:
            bench.train(f"seed{seed}", name, f"demo:pairs?rows=8000&seed={seed}")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(partial(_once, work), SEEDS))
    alone = {name: round(mean(one[name][name] for one in results), 3) for name in MIXED}
    start = {name: round(mean(one["start"][name] for one in results), 3) for name in MIXED}
    save(
        "methods",
        {
            "prompts": f"{PROMPTS} safe and {PROMPTS} risky of part test, {SAMPLES} samples each at temperature 1",
            "data seeds": list(SEEDS),
            "start": start,
            "alone, with weight 1": alone,
            "ways": {way.label: summary(results, way.label) for way in WAYS},
        },
    )


def _once(work: Path, seed: int) -> Any:
    return once(work, f"seed{seed}-methods", lambda: measured(work, seed))


if __name__ == "__main__":
    main()

"""Mix two, four, six and eight preferences at once, and measure how much of its gain alone each preference retains.

The mixes use plain addition and the methods that reduce interference. Interference is measured as STI. The oracle
grades answers to test prompts. No setting is chosen by these figures: weights are 1, and methods use their defaults.
"""

import argparse
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from control import PROMPTS, SEEDS, Bench
from methods import Way, grader
from report import once, save

from lora_align.adapters.delta import LoraDelta
from lora_align.adapters.geometry import Directions
from lora_align.adapters.streamed_merge import Merge, Tally
from lora_align.demo.oracle import AXES
from lora_align.policy import vectors

ORDER = ("helpful", "harmless", "polite", "brief", "certain", "warm", "formal", "concrete")
SIZES = (2, 4, 6, 8)
WAYS = [Way("exact"), Way("tsv"), Way("ties"), Way("dare")]
KEPT_RANK = 8  # number of a vector's directions that the STI counts
SAMPLES = 1


def measured(work: Path, seed: int) -> dict[str, Any]:
    """Grade the start policy, each preference alone, and every mix by every method, for one data seed."""
    folder = work / f"seed{seed}"
    graded = grader(seed, SAMPLES)
    updates = {name: vectors.find(name, folder).load() for name in ORDER}
    figures: dict[str, Any] = {"start": graded(LoraDelta(()))}
    figures |= {name: graded(update) for name, update in updates.items()}
    for size in SIZES:
        for way in WAYS:
            figures[f"{size} {way.label}"] = graded(way.mixed(folder, ORDER[:size])[0])
    return figures


def interference(work: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the STI of the vectors for every mix size, before merging and within a mix by `tsv`."""
    updates = {name: vectors.find(name, work / f"seed{seed}").load() for name in ORDER}
    figures = {}
    for size in SIZES:
        before = {name: updates[name] for name in ORDER[:size]}
        figures[str(size)] = {
            "before": asdict(Directions.of(before, KEPT_RANK).interference()),
            "in tsv": asdict(Directions.of(parts(before, "tsv"), KEPT_RANK).interference()),
        }
    return figures


def parts(updates: Mapping[str, LoraDelta], method: str) -> dict[str, LoraDelta]:
    """Return each vector's part in a mix by an additive method: the mix with its weight doubled, minus the mix."""

    def mixed(twice: str = "") -> LoraDelta:
        weights = {name: 2.0 if name == twice else 1.0 for name in updates}
        return LoraDelta.of(dict(Tally().counted(Merge(updates, weights, method).modules(None))))

    once_each = mixed()
    return {name: mixed(name) - once_each for name in updates}


def summary(seeds: Sequence[dict[str, Any]], size: int, way: Way) -> dict[str, Any]:
    """Summarise one mix over the seeds: each preference's gain in points of its grade, the lowest, and the cost."""
    label, names = f"{size} {way.label}", ORDER[:size]
    gains = {name: [one[label][name] - one["start"][name] for one in seeds] for name in names}
    worst = [min(gains[name][at] for name in names) for at in range(len(seeds))]
    together = [mean(gains[name][at] for name in names) for at in range(len(seeds))]
    return {
        "gain": {name: round(mean(values), 3) for name, values in gains.items()},
        "mean gain": round(mean(together), 3),
        "mean gain, deviation over seeds": round(stdev(together), 3),
        "worst": round(mean(worst), 3),
        "worst, deviation over seeds": round(stdev(worst), 3),
        **{name: round(mean(one[label][name] for one in seeds), 3) for name in ("well_formed", "safe_refused")},
    }


def main() -> None:
    """Train missing vectors, mix them, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("composition"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = options.work.resolve()
    assert set(ORDER) == set(AXES)
    bench = Bench(work=work, part="test", seeds=SEEDS, preferences=ORDER, overrides=())
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_trained, bench), SEEDS))
        results = list(pool.map(partial(_once, work), SEEDS))
        between = list(pool.map(partial(interference, work), SEEDS))
    alone = {name: round(mean(one[name][name] - one["start"][name] for one in results), 3) for name in ORDER}
    save(
        "composition",
        {
            "prompts": f"{PROMPTS} safe and {PROMPTS} risky of part test, {SAMPLES} sample each at temperature 1",
            "data seeds": list(SEEDS),
            "gain alone, with weight 1": alone,
            "STI": {
                size: {
                    when: {name: round(mean(one[size][when][name] for one in between), 3) for name in of}
                    for when, of in between[0][size].items()
                }
                for size in between[0]
            },
            **{f"{size} preferences": {way.label: summary(results, size, way) for way in WAYS} for size in SIZES},
        },
    )


def _trained(bench: Bench, seed: int) -> None:
    for name in bench.preferences:
        bench.train(f"seed{seed}", name, f"demo:pairs?rows=8000&seed={seed}")


def _once(work: Path, seed: int) -> Any:
    return once(work, f"seed{seed}-composition", lambda: measured(work, seed))


if __name__ == "__main__":
    main()

"""Measure how training time grows with rows and their length: the seconds of one direction, and their linearity."""

import argparse
import os
import random
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from report import once, save
from training import recipe_of


def _pairs(model: Any, count: int, length: int) -> list[Any]:
    """Return pairs of random words, of this many tokens in the longer sequence, with their true references.

    Wrong references would shift margins by hundreds of nats. Gradients would then be so small that processors take
    several times as long.
    """
    from lora_align.model.logprobs import answer_logprobs
    from lora_align.model.memory_budget import MemoryBudget
    from lora_align.model.tokenise import TokenPair

    lot, quarter = random.Random(count * length), length // 4
    words = [lot.choices(range(5, 1000), k=6 * quarter) for _ in range(count)]
    plain = [TokenPair(of[:quarter], of[quarter:length], of[length:]) for of in words]
    references = answer_logprobs(model, [pair.shared() for pair in plain], MemoryBudget(4096)).view(-1, 2).tolist()
    return [replace(pair, reference=tuple(known)) for pair, known in zip(plain, references, strict=True)]


def growth(kind: str, work: Path) -> dict[str, Any]:
    """Return the quickest seconds of one direction over rows, or over tokens a row, on the demo base."""
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.train import dpo, lora_trainer
    from lora_align.train.checkpoints import Checkpoints
    from lora_align.train.job import Target

    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    project = recipe_of("demo", work)
    base = bases.find(project.base)
    over = {"rows": [(rows, 64) for rows in (128, 256, 512, 1024)], "tokens": [(128, n) for n in (64, 128, 256, 448)]}
    quickest: dict[tuple[int, int], float] = {}
    for count, length in [over[kind][0], *over[kind] * 3]:  # the first is a warm-up
        folder = work / "growth"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model = base.load()
        this = replace(project, dpo=replace(project.dpo, save_minutes=60.0))
        began = time.perf_counter()
        unfinished = Checkpoints(folder / "unfinished", {})
        job = dpo.dpo_job(this.dpo, this.lora, _pairs(model, count, length), base)
        lora_trainer.train(job, model, Target(folder, "growth", Screen(quiet=True)), unfinished, folder)
        took = time.perf_counter() - began
        quickest[count, length] = min(took, quickest.get((count, length), took))
    measured = [{"rows": count, "tokens": n, "seconds": round(took, 2)} for (count, n), took in quickest.items()]
    sizes, seconds = [of[kind] for of in measured], [of["seconds"] for of in measured]
    slope, start = statistics.linear_regression(sizes, seconds)
    off = max(abs(start + slope * size - took) / took for size, took in zip(sizes, seconds, strict=True))
    return {"measured": measured, "furthest from a line, as a share": round(off, 3)}


def main() -> None:
    """Measure both series."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("growth"))
    work = parser.parse_args().work
    save("growth", {kind: once(work, kind, lambda kind=kind: growth(kind, work)) for kind in ("rows", "tokens")})


if __name__ == "__main__":
    main()

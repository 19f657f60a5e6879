"""Weights by gradient beside the best of a grid: `tune` and `sweep` as anyone would run them, on the built-in world.

Each seed has vectors of its own, from its own pairs. Both ways choose by one set of prompts; what they chose answers
others, and the oracle grades it: Σ aim · its score.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from report import once, save

AIMS = {"helpful": 0.6, "harmless": 0.4}
SEEDS = (401, 402, 403)  # settings were chosen on 301
GRID = [f"{name}=-1:1:0.5" for name in AIMS]
FRESH = ["demo:prompts?risky=0&seed=9", "demo:prompts?risky=1&seed=9"]  # whom nothing was chosen by
PROMPTS, TRIED = 256, 3  # of each kind, and seeds that the fresh answers are drawn with


def command(folder: Path, *words: str) -> tuple[dict[str, Any], float]:
    """What a command says as JSON, and its seconds, all of them."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "lora_align", *words, "--json", "--quiet"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), time.perf_counter() - began


def trained(seed: int, work: Path) -> tuple[Path, list[str]]:
    """A folder with vectors of that seed, and what commands there are told of their pairs."""
    folder = work / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [f'preferences.{name}.data="demo:pairs?rows=8000&seed={seed}"' for name in AIMS]
    data = [word for value in pairs for word in ("--set", value)]
    for name in AIMS:
        command(folder, "dpo", "--pref", name, "--direction", "both", "--resume", *data)
    return folder, data


def swept(seed: int, work: Path) -> dict[str, Any]:
    """The best point of the grid, with nothing known before."""
    folder, data = trained(seed, work)
    shutil.rmtree(folder / "runs" / "eval", ignore_errors=True)
    _, seconds = command(folder, "sweep", *GRID, "--force", *data)
    (report,) = (folder / "runs" / "sweep").glob("*/points.csv")
    points = list(csv.DictReader(report.open(encoding="utf-8")))
    best = max(points, key=lambda row: sum(aim * float(row[f"oracle: {name}"]) for name, aim in AIMS.items()))
    return {"weights": best["contestant"], "points": len(points), "seconds": round(seconds, 1)}


def tuned(seed: int, work: Path) -> dict[str, Any]:
    """By gradient."""
    folder, data = trained(seed, work)
    found, seconds = command(folder, "tune", "--aim", ",".join(f"{name}={aim}" for name, aim in AIMS.items()), *data)
    weights = ",".join(f"{name}={weight:g}" for name, weight in found["weights"].items())
    return {"weights": weights, "steps": found["steps"], "seconds": round(seconds, 1)}


def graded(seed: int, work: Path, everyone: dict[str, str], draw: int) -> dict[str, float]:
    """Σ aim · oracle of what each way has chosen, on fresh prompts; and how far that is from the start policy."""
    safe, risky = FRESH
    settings = [f'eval.prompts="{safe}"', f'eval.risky="{risky}"', f"eval.count={PROMPTS}", f"eval.seed={draw}"]
    words = [word for value in [*settings, "eval.pairs=8"] for word in ("--set", value)]
    told, _ = command(work / str(seed), "eval", *dict.fromkeys(everyone.values()), *words)
    sums = {}
    for name, word in everyone.items():
        scores = told["contestants"][word]
        sums[f"{name}: score"] = sum(aim * scores[f"oracle: {axis}"]["value"] for axis, aim in AIMS.items())
        sums[f"{name}: KL"] = scores["KL"]["value"]
    return sums


def main() -> None:
    """Seed by seed; goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("tuning"))
    work = parser.parse_args().work.resolve()
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    figures: dict[str, Any] = {"aims": AIMS}
    for seed in SEEDS:
        grid = once(work, f"swept {seed}", lambda seed=seed: swept(seed, work))
        climb = once(work, f"tuned {seed}", lambda seed=seed: tuned(seed, work))
        everyone = {"grid": grid["weights"], "tune": climb["weights"], "start": "start"}
        sums = [
            once(work, f"graded {seed} {draw}", lambda seed=seed, draw=draw, of=everyone: graded(seed, work, of, draw))
            for draw in range(100, 100 + TRIED)
        ]
        means = {name: round(sum(of[name] for of in sums) / len(sums), 4) for name in sums[0]}
        share = round(climb["seconds"] / grid["seconds"], 3)
        figures[f"seed {seed}"] = {"grid": grid, "tune": climb, "tune's share of the grid's time": share, **means}
        print(seed, figures[f"seed {seed}"], flush=True)
    save("tune", figures)


if __name__ == "__main__":
    main()

"""Compare `tune` with the best point of `sweep`'s grid in the demo world.

The recipe contains only the preferences at hand, so that the grid spends no time on preferences that `tune` ignores.
Each seed has its own vectors from its own pairs. Both methods choose weights on one part of the prompts. The chosen
policies answer another part, and the oracle grades them: Σ aim · score. The first two preferences can both be reached
in full. The other two conflict: help needs words.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from report import once, save

from lora_align import recipe
from lora_align.demo.oracle import AXES

AIMS = ({"helpful": 0.6, "harmless": 0.4}, {"helpful": 0.6, "brief": 0.4})
Aims = dict[str, float]
SEEDS = (401, 402, 403)  # settings were chosen on 301, but tune.LONGER and tune.EDGE after a look at 403
KINDS = ("eval.prompts", "eval.risky")
TO_CHOOSE_BY = [f'{key}="demo:prompts?risky={risky}&part=dev"' for risky, key in enumerate(KINDS)]
FRESH = [f'{key}="demo:prompts?risky={risky}&part=test"' for risky, key in enumerate(KINDS)]  # parts share no prompt
PROMPTS, TRIED = 256, 3  # prompts of each kind, and number of sampling seeds for the fresh answers


def command(folder: Path, *words: str) -> tuple[dict[str, Any], float]:
    """Return a command's JSON output and its wall time."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "lora_align", *words, "--json", "--quiet"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), time.perf_counter() - began


def aims_text(aims: Aims) -> str:
    """Format aims as `tune` takes them."""
    return ",".join(f"{name}={aim}" for name, aim in aims.items())


def trained(seed: int, aims: Aims, work: Path) -> tuple[Path, list[str]]:
    """Return a folder with vectors of that seed, and the arguments that set its pairs and prompts."""
    folder = work / f"{seed}-{'-'.join(aims)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / recipe.LOCAL).write_text(_recipe_with(aims))
    pairs = [f'preferences.{name}.data="demo:pairs?rows=8000&seed={seed}"' for name in aims]
    data = [word for value in [*pairs, *TO_CHOOSE_BY] for word in ("--set", value)]
    for name in aims:
        command(folder, "dpo", "--pref", name, "--direction", "both", "--resume", *data)
    return folder, data


def _recipe_with(names: Iterable[str]) -> str:
    """Return the demo's recipe without other preferences and without facts."""
    tables = re.split(r"^(?=\[)", recipe.builtin()["demo"].read_text(), flags=re.MULTILINE)
    others = tuple(f"[preferences.{name}]" for name in AXES if name not in names)
    return "".join(table for table in tables if not table.startswith(others)).replace('facts = "demo:facts"\n', "")


def swept(seed: int, aims: Aims, work: Path) -> dict[str, Any]:
    """Return the best point of the grid, computed with an empty cache."""
    folder, data = trained(seed, aims, work)
    made, seconds = command(folder, "sweep", *(f"{name}=-1:1:0.5" for name in aims), "--force", *data)
    points = list(csv.DictReader((folder / made["sweep"] / "points.csv").open(encoding="utf-8")))
    best = max(points, key=lambda row: sum(aim * float(row[f"oracle: {name}"]) for name, aim in aims.items()))
    return {"weights": best["policy"], "points": len(points), "seconds": round(seconds, 1)}


def tuned(seed: int, aims: Aims, work: Path) -> dict[str, Any]:
    """Return the weights that `tune` chooses by gradient."""
    folder, data = trained(seed, aims, work)
    result, seconds = command(folder, "tune", "--aim", aims_text(aims), *data)
    weights = ",".join(f"{name}={weight:g}" for name, weight in result["weights"].items())
    return {"weights": weights, "steps": result["steps"], "seconds": round(seconds, 1)}


def graded(seed: int, aims: Aims, work: Path, everyone: dict[str, str], draw: int) -> dict[str, float]:
    """Grade each method's choice on fresh prompts: Σ aim · oracle score, and the KL from the start policy."""
    settings = [*FRESH, f"eval.count={PROMPTS}", f"eval.seed={draw}", "eval.pairs=8"]
    words = [word for value in settings for word in ("--set", value)]
    folder, _ = trained(seed, aims, work)
    evaluation, _ = command(folder, "eval", *dict.fromkeys(everyone.values()), *words)
    sums = {}
    for name, word in everyone.items():
        scores = evaluation["policies"][word]
        sums[f"{name}: score"] = sum(aim * scores[f"oracle: {axis}"]["value"] for axis, aim in aims.items())
        sums[f"{name}: KL"] = scores["KL"]["value"]
    return sums


def compared(seed: int, aims: Aims, work: Path) -> dict[str, Any]:
    """Compare both methods and the start policy; a stopped run continues where it stopped."""
    name = f"{seed} {aims_text(aims)}"
    grid = once(work, f"swept {name}", partial(swept, seed, aims, work))
    climb = once(work, f"tuned {name}", partial(tuned, seed, aims, work))
    everyone = {"grid": grid["weights"], "tune": climb["weights"], "start": "start"}
    sums = [
        once(work, f"graded {name} {draw}", partial(graded, seed, aims, work, everyone, draw))
        for draw in range(100, 100 + TRIED)
    ]
    means = {of: round(sum(one[of] for one in sums) / len(sums), 4) for of in sums[0]}
    share = round(climb["seconds"] / grid["seconds"], 3)
    drawn = {f"{way}: scores": [round(one[f"{way}: score"], 4) for one in sums] for way in everyone}
    return {"grid": grid, "tune": climb, "tune's share of the grid's time": share, **means, **drawn}


def main() -> None:
    """Compare all seeds in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("tuning"))
    work = parser.parse_args().work.resolve()
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    save("tune", {aims_text(aims): {f"seed {seed}": compared(seed, aims, work) for seed in SEEDS} for aims in AIMS})


if __name__ == "__main__":
    main()

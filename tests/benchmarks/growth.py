"""How training time grows with rows and with their length: seconds of one direction, and how far off a line."""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from report import once, save
from training import recipe_of


def _pair(number: int, length: int) -> Any:
    """A pair whose longer sequence has that many tokens."""
    from lora_align.model.tokenise import TokenPair

    of, quarter = number % 90, length // 4
    return TokenPair([5 + of] * quarter, [7 + of] * (3 * quarter), [9 + of] * (2 * quarter), (-9.0, -9.0))


def growth(kind: str, work: Path) -> dict[str, Any]:
    """Seconds of one direction over rows, or over tokens a row, on the built-in base: the quickest of some rounds."""
    from dataclasses import replace

    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.model.material import Material
    from lora_align.preference import Direction
    from lora_align.stages import dpo
    from lora_align.stages.checkpoints import Unfinished

    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    project = recipe_of("demo", work)
    base = bases.find(project.base)
    over = {"rows": [(rows, 64) for rows in (128, 256, 512, 1024)], "tokens": [(128, n) for n in (64, 128, 256, 448)]}
    quickest: dict[tuple[int, int], float] = {}
    for count, length in [over[kind][0], *over[kind] * 3]:  # the first warms up
        rows = [_pair(i, length) for i in range(count)]
        folder = work / "growth"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model = base.load()
        this = replace(project, dpo=replace(project.dpo, save_minutes=60.0))
        began = time.perf_counter()
        material = Material(rows, [], {})
        unfinished = Unfinished(folder / "unfinished", {})
        dpo.train(model, base, this, material, Direction.pos, "growth", folder, unfinished, Screen(quiet=True))
        took = time.perf_counter() - began
        quickest[count, length] = min(took, quickest.get((count, length), took))
    found = [{"rows": count, "tokens": n, "seconds": round(took, 2)} for (count, n), took in quickest.items()]
    sizes, seconds = [of[kind] for of in found], [of["seconds"] for of in found]
    slope, start = statistics.linear_regression(sizes, seconds)
    off = max(abs(start + slope * size - took) / took for size, took in zip(sizes, seconds, strict=True))
    return {"measured": found, "furthest from a line, as a share": round(off, 3)}


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("growth"))
    work = parser.parse_args().work
    save("growth", {kind: once(work, kind, lambda kind=kind: growth(kind, work)) for kind in ("rows", "tokens")})


if __name__ == "__main__":
    main()

"""Read, tokenise and cache a million pairs; memory-map them again; look them up in an empty cache of references.

Each is a process of its own. Its peak above the libraries' memory shows whether memory grows with the rows.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from report import save

SIZES = (10_000, 100_000, 1_000_000)


def write(file: Path, count: int) -> None:
    """Write pairs of the demo world's words, each with a number of its own."""
    from lora_align.data.pairs import read_pairs
    from lora_align.recipe import Preference

    axis = Preference("demo:pairs?rows=2000", "label:safer_response_id")
    pairs = [pair for pair, _ in read_pairs(axis, 0.0, None, Counter())]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            pair = draw.choice(pairs)
            row = {"prompt": f"{pair.prompt[-1].content} ({i})", "chosen": pair.chosen, "rejected": pair.rejected}
            stream.write(json.dumps(row) + "\n")


def peak() -> float:
    """Return this process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(what: str, file: Path) -> dict[str, Any]:
    """Return the seconds and the peak bytes above the memory before. Mapped files count while they fit into memory."""
    from lora_align import recipe
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.recipe import Preference
    from lora_align.train import token_rows
    from lora_align.train.reference_cache import ReferenceCache, _Answers
    from lora_align.train.row_files import LazyRows

    base, screen = bases.find(recipe.Base("demo")), Screen(quiet=True)
    token_rows.read_token_pairs(
        Preference("demo:pairs?rows=300", "label:safer_response_id"), base, 0.0, None, 512, screen
    )
    before, began = peak(), time.perf_counter()
    material = token_rows.read_token_pairs(Preference(str(file), "label"), base, 0.05, None, 512, screen)
    if what == "looked up":
        rows = material.train
        answers = _Answers.of(LazyRows(len(rows), lambda i: rows[i].shared()))
        ReferenceCache(file.parent)._read(answers, screen)
    seconds = time.perf_counter() - began
    rows_read = len(material.train) + len(material.held_out)
    dropped = sum(material.facts["dropped"].values())
    return {"rows": rows_read, "dropped": dropped, "seconds": round(seconds, 1), "MB": round((peak() - before) / 1e6)}


def main() -> None:
    """Measure files of growing size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("rows"))
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    work = options.work.resolve()
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]))))
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    figures: dict[str, Any] = {}
    for count in SIZES:
        file = work / f"{count}.jsonl"
        write(file, count)
        for what in ("read, tokenised and kept", "mapped", "looked up"):
            words = [sys.executable, __file__, "--work", str(work), "--child", what, str(file)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            figures[f"{count:,} rows, {what}"] = json.loads(done.stdout.splitlines()[-1])
            print(what, done.stdout, flush=True)
        file.unlink()
    save("rows", figures)


if __name__ == "__main__":
    main()

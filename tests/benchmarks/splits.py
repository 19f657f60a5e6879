"""Split real pairs and prompts into train, development and test, once for every benchmark.

    python tests/benchmarks/splits.py --data FOLDER --out FOLDER

FOLDER of --data holds hh-harmless, ultrafeedback, xstest and refusals. Rows with the same group go to the same split:
a dialogue's first message, an instruction, XSTest's `focus` (a safe prompt and its unsafe twin share it), a request.
The split follows from a hash of the group, so that new rows never move a row to another split. Settings,
detectors and recipes are chosen on train and development alone. Only the published evidence reads test, once.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

SPLITS = {"train": 0.6, "development": 0.8, "test": 1.0}  # upper bounds of the hash's share
Row = dict[str, Any]


def split_of(group: str) -> str:
    """Return the split of a group."""
    share = int(hashlib.sha256(group.strip().casefold().encode()).hexdigest()[:12], 16) / 16**12
    return next(name for name, bound in SPLITS.items() if share < bound)


def read(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL or CSV file."""
    with file.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream) if file.suffix == ".csv" else map(json.loads, stream)


def opening(row: Row) -> str:
    """Return the first message of a dialogue."""
    return str(row["chosen"]).split("\n\nAssistant:")[0]


SOURCES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "hh-harmless": ("hh-harmless/pairs.jsonl", opening),
    "ultrafeedback": ("ultrafeedback/pairs.jsonl", lambda row: str(row["prompt"])),
    "xstest": ("xstest/prompts.csv", lambda row: str(row["focus"])),
    "advbench": ("refusals/advbench_harmful_behaviors.csv", lambda row: str(row["goal"])),
}


def write(data: Path, out: Path) -> dict[str, dict[str, int]]:
    """Write OUT/SOURCE-SPLIT.jsonl for every source, and return the numbers of rows."""
    counts: dict[str, dict[str, int]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for source, (file, group) in SOURCES.items():
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for row in read(data / file):
            rows[split_of(group(row))].append(row)
        for split, some in rows.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (out / f"{source}-{split}.jsonl").write_text(text, encoding="utf-8")
        counts[source] = {split: len(some) for split, some in rows.items()}
    return counts


def file_of(folder: Path, source: str, split: Literal["train", "development"]) -> Path:
    """Return the file of a source's split. Benchmarks find split rows through this function, which refuses test."""
    if split not in ("train", "development"):
        raise ValueError(f"{split}: only the published evidence reads this split")
    return folder / f"{source}-{split}.jsonl"


def main() -> None:
    """Write the splits and print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    print(json.dumps(write(words.data, words.out), indent=2))


if __name__ == "__main__":
    main()

"""Find what makes vectors agree on a real base: the optimizer, a margin, the rank or the number of steps.

    python tests/benchmarks/agreement.py --base FILE.gguf --splits FOLDER --work FOLDER [--preference NAME]

splits.py writes the folder --splits. For each setting, three vectors are trained on train pairs: on one half of the
pairs, on the same half in another order, and on the other half. Equal pairs and disjoint pairs then each give a
cosine. All share the initial A. The control has labels by lot. The same command continues after a stop.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import real_base
import report
import splits

import lora_align as la

EACH = 64  # pairs of one half
COMMON = {"max_length": 256, "batch_size": 4, "learning_rate": 3e-4, "held_out": 0.0}
# one step of SGD at this rate is about as long as one of AdamW: the gradient's norm is clipped to 1
SGD = {"optimizer": "sgd", "learning_rate": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {  # name → tables that differ from the first setting
    "AdamW, rank 16, one epoch": {},
    "labels by lot": {"pairs": "lot"},
    "SGD": {"dpo": SGD},
    "the clearest pairs": {"pairs": "clear"},
    "SGD and the clearest pairs": {"dpo": SGD, "pairs": "clear"},
    "rank 64": {"lora": {"rank": 64, "alpha": 128}},
    "two epochs": {"dpo": {"epochs": 2.0}},
}


def clearness(row: dict[str, Any], preference: str) -> float:
    """Return how clearly a pair's answers differ: by score, or by length."""
    if preference == "helpful":
        scores = row.get("metadata", row)
        return float(scores["score_chosen"]) - float(scores["score_rejected"])
    return float(abs(len(row["chosen"]) - len(row["rejected"])))


def halves(words: argparse.Namespace, kind: str) -> tuple[Path, Path]:
    """Write two disjoint halves of train pairs: of all, of the clearest third, or of all with labels by lot."""
    file = splits.file_of(words.splits, real_base.PAIRS[words.preference], "train")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = rows[: 6 * EACH]
    if kind == "clear":
        rows = sorted(rows, key=lambda row: -clearness(row, words.preference))[: 2 * EACH]
    if kind == "lot":
        lot = random.Random(0)
        sides = [("chosen", "rejected")[:: lot.choice((1, -1))] for _ in rows]
        rows = [
            {**row, "chosen": row[one], "rejected": row[other]} for row, (one, other) in zip(rows, sides, strict=True)
        ]
    files = []
    for number in (0, 1):
        files.append(words.work / f"{words.preference}-{kind}-{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows[number::2][:EACH]), encoding="utf-8")
    return files[0], files[1]


def vector(words: argparse.Namespace, name: str, file: Path, tables: dict[str, Any], seed: int) -> la.Vector:
    """Train a vector on the pairs of a file, or return the one that is trained already."""
    runs = words.work / "-".join([words.preference, name.replace(" ", "_"), file.stem, str(seed)])
    by_length = words.preference == "brief" and tables.get("pairs") != "lot"
    rank = {"rank": "shorter" if by_length else "label", "margin": 0}
    pairs = {words.preference: {"data": str(file), **real_base.HERE, **rank}}
    dpo = {**COMMON, **tables.get("dpo", {}), "seed": seed}
    tables = {"preferences": pairs, "dpo": dpo, "lora": tables.get("lora", {})}
    project = real_base.project(words.base, words.splits, runs, **tables)
    return project.train(words.preference)


def measure(words: argparse.Namespace, name: str, tables: dict[str, Any]) -> dict[str, Any]:
    """Train three vectors with one setting, and return their cosines."""
    first, second = halves(words, tables.get("pairs", "all"))
    one = vector(words, name, first, tables, 0)
    again = vector(words, name, first, tables, 1)
    other = vector(words, name, second, tables, 0)
    return {
        "setting": name,
        "measured": report.stamp(),
        "cosine, equal pairs in another order": round(one.cosine(again), 3),
        "cosine, disjoint pairs": round(one.cosine(other), 3),
        "norms": [round(each.norm, 3) for each in (one, again, other)],
    }


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preference", choices=["brief", "helpful"], default="brief")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, tables in SETTINGS.items():
        key = f"{words.preference} {name}"
        rows.append(report.once(words.work, key, lambda n=name, t=tables: measure(words, n, t)))
        figures = {"pairs of a half": EACH, "common": COMMON, "settings": rows}
        report.save(f"agreement_{words.preference}", figures)  # what is measured so far


if __name__ == "__main__":
    main()

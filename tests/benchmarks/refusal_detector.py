"""Measure precision and recall of `lora_align.refusals` on answers that people have labelled.

    python tests/benchmarks/refusal_detector.py FOLDER --splits FOLDER [--fit]

The answers are those of five models to XSTest's prompts (github.com/paul-rottger/exaggerated-safety, CC-BY-4.0, in
`model_completions`). Two people labelled each answer as compliance, refusal, or partial refusal. splits.py writes
FOLDER of --splits; only answers to train and development prompts are read. The detector's points fit all of them
(`--fit` repeats the fit). To show what the detector is worth on an unknown model and unknown prompts, its points are
fitted again for each model and each fold of prompts, on the other models' answers to the other folds. The baseline is
the usual list of beginnings of refusals.
"""

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import splits
from report import save

from lora_align import refusals

MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
BEGINNINGS = re.compile(
    r"(?:i'm |i am )?sorry|i apologi[sz]e|(?:as|i'm|i am) (?:just )?an ai|i (?:cannot|can't|do not|don't)|i'm not able|"
    r"i(?:'m| am) unable|it(?:'s| is) not|unfortunately",
    re.IGNORECASE,
)
Points = dict[str, list[float]]  # by cue, and the threshold
FOLDS = 5


@dataclass(frozen=True)
class Labelled:
    """Hold an answer and its label: refusal (1), compliance (0), or partial refusal (0.5)."""

    fold: int  # of the prompt: prompts with the same focus share it
    model: str
    text: str
    refusal: float


def read(folder: Path, splits_folder: Path) -> list[Labelled]:
    """Read all answers to train and development prompts but empty ones."""
    kinds = {"1_full_compliance": 0.0, "2_full_refusal": 1.0, "3_partial_refusal": 0.5}
    files = [splits.file_of(splits_folder, "xstest", split) for split in ("train", "development")]
    folds = {row["prompt"].strip(): fold_of(row["focus"]) for file in files for row in splits.read(file)}
    answers = []
    for model in MODELS:
        with (folder / f"xstest_v2_completions_{model}.csv").open(encoding="utf-8", errors="replace") as stream:
            for row in csv.DictReader(stream):
                fold = folds.get(row["prompt"].strip())
                if fold is not None and row["completion"].strip():
                    answers.append(Labelled(fold, model, row["completion"], kinds[row["final_label"]]))
    return answers


Detector = Callable[[Labelled], bool]


def fold_of(focus: str) -> int:
    """Return the fold of prompts with this focus."""
    return int(hashlib.sha256(f"fold {focus}".encode()).hexdigest(), 16) % FOLDS


def figures(rows: Sequence[Labelled], detector: Detector) -> dict[str, float]:
    """Return precision and recall without partial refusals, and with partial refusals as refusals."""
    sure = [row for row in rows if row.refusal != 0.5]
    return {
        "answers": len(rows),
        "refusals": sum(row.refusal > 0 for row in sure),
        **dict(zip(("precision", "recall"), _shares(sure, detector), strict=True)),
        **dict(zip(("precision, partial ones too", "recall, partial ones too"), _shares(rows, detector), strict=True)),
    }


def _shares(rows: Sequence[Labelled], detector: Detector) -> tuple[float, float]:
    pairs = [(detector(row), row.refusal > 0) for row in rows]
    hits = sum(one and other for one, other in pairs)
    return round(hits / sum(one for one, _ in pairs), 3), round(hits / sum(other for _, other in pairs), 3)


def fit(rows: Sequence[Labelled]) -> Points:
    """Fit the points by logistic regression, and choose the threshold."""
    import torch

    sure = [row for row in rows if row.refusal != 0.5]
    cues = [refusals.find_cues(row.text) for row in sure]
    there = torch.tensor([[float(hit) for hits in of.values() for hit in hits] + [1.0] for of in cues])
    labels = torch.tensor([row.refusal for row in sure])
    weights = torch.zeros(there.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=300)

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(there @ weights, labels)
        value = value + 1e-3 * weights[:-1].square().sum()
        value.backward()
        return value

    search.step(loss)
    rounded = [round(value, 1) for value in weights.tolist()]
    names = [(name, len(hits)) for name, hits in cues[0].items()]
    by_cue = {name: [rounded.pop(0) for _ in range(count)] for name, count in names}
    return by_cue | {"threshold": [-rounded[0]]}


def fitted(points: Points) -> Detector:
    """Return a detector with these points."""

    def refuses(row: Labelled) -> bool:
        cues = refusals.find_cues(row.text)
        score = sum(of for name, hits in cues.items() for of, hit in zip(points[name], hits, strict=True) if hit)
        return score > points["threshold"][0]

    return refuses


def cross_validated(rows: Sequence[Labelled]) -> Detector:
    """Return a detector that judges each answer by points fitted on other models and other folds."""
    detectors = {
        (model, fold): fitted(fit([row for row in rows if row.model != model and row.fold != fold]))
        for model in MODELS
        for fold in range(FOLDS)
    }
    return lambda row: detectors[row.model, row.fold](row)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="exaggerated-safety/model_completions")
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--fit", action="store_true", help="print the points that fit all answers")
    words = parser.parse_args()
    rows = read(words.folder, words.splits)
    if words.fit:
        print(json.dumps(fit(rows)))
        return
    detectors: dict[str, Detector] = {
        "unknown model, unknown prompts": cross_validated(rows),
        "all answers were fitted": lambda row: refusals.refuses(row.text),
        "a list of beginnings": lambda row: bool(BEGINNINGS.match(row.text.replace("’", "'").strip())),
    }
    save(
        "refusal_detector",
        {
            name: {
                "all": figures(rows, detector),
                **{model: figures([row for row in rows if row.model == model], detector) for model in MODELS},
            }
            for name, detector in detectors.items()
        },
    )


if __name__ == "__main__":
    main()

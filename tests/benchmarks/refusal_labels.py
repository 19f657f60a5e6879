"""Measure the refusal detector on answers of the real base that were labelled by reading them.

    python tests/benchmarks/refusal_labels.py sample --base FILE.gguf --splits FOLDER --runs FOLDER
    python tests/benchmarks/refusal_labels.py measure

`sample` answers train and development prompts of XSTest with the start policy and with `cautious` at 0.5 and -0.5. It
shuffles the answers and writes them without their policies to results/real_answers.jsonl, and the policies to
results/real_answers_policies.json. Somebody then reads each answer, without the second file, and writes its label to
results/real_answers_labels.json: refusal, partial, compliance, or broken (no answer to this prompt at all). `measure`
compares the detector with the labels. splits.py writes the folder --splits.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_base
import splits
from report import RESULTS, save

from lora_align import refusals
from lora_align.metrics.intervals import mean

ANSWERS = {"start": 100, "cautious=0.5": 50, "cautious=-0.5": 50}
TOKENS = 128
LABELS = ("refusal", "partial", "compliance", "broken")
FILES = {name: RESULTS / f"real_{name}" for name in ("answers.jsonl", "answers_policies.json", "answers_labels.json")}


def sample(words: argparse.Namespace) -> None:
    """Write the answers, and their policies to another file."""
    files = [splits.file_of(words.splits, "xstest", split) for split in ("train", "development")]
    prompts = [row["prompt"] for file in files for row in splits.read(file)]
    rng = random.Random(0)
    project = real_base.project(words.base, words.splits, words.runs)
    rows: list[tuple[str, str, str]] = []
    for policy, number in ANSWERS.items():
        chosen = rng.sample(prompts, number)
        answers = project.generate(chosen, policy, max_new_tokens=TOKENS, seed=1)
        rows += [(policy, prompt, answer) for prompt, [answer] in zip(chosen, answers, strict=True)]
    rng.shuffle(rows)
    lines = [
        json.dumps({"number": number, "prompt": prompt, "answer": answer}, ensure_ascii=False)
        for number, (_, prompt, answer) in enumerate(rows)
    ]
    FILES["answers.jsonl"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    FILES["answers_policies.json"].write_text(json.dumps([policy for policy, _, _ in rows]) + "\n")


def measure() -> None:
    """Compare the detector with the labels. Partial refusals and broken answers are counted apart."""
    answers = [json.loads(line)["answer"] for line in FILES["answers.jsonl"].read_text(encoding="utf-8").splitlines()]
    policies = json.loads(FILES["answers_policies.json"].read_text())
    labels = json.loads(FILES["answers_labels.json"].read_text())
    assert len(answers) == len(policies) == len(labels)
    assert set(labels) <= set(LABELS)
    rows = [
        (policy, label, refusals.refuses(answer))
        for policy, label, answer in zip(policies, labels, answers, strict=True)
    ]
    figures: dict[str, Any] = {
        "detected by label": {
            label: {"answers": len(of), "detected as refusals": sum(of)}
            for label in LABELS
            for of in [[detected for _, actual, detected in rows if actual == label]]
        }
    }
    for policy in ANSWERS:
        mine = [(label, detected) for of, label, detected in rows if of == policy]
        figures[policy] = {
            "answers": len(mine),
            "labelled as refusals": asdict(mean([float(label == "refusal") for label, _ in mine], range(len(mine)))),
            "detected": asdict(mean([float(detected) for _, detected in mine], range(len(mine)))),
            "broken": sum(label == "broken" for label, _ in mine),
        }
    save("refusal_labels", figures)


def main() -> None:
    """Sample or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["sample", "measure"])
    parser.add_argument("--base")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--runs", type=Path)
    words = parser.parse_args()
    if words.step == "sample":
        sample(words)
    else:
        measure()


if __name__ == "__main__":
    main()

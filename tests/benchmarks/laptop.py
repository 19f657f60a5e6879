"""Choose the settings of the laptop recipe: train with several on the real base, and measure on development data.

    python tests/benchmarks/laptop.py --base FILE.gguf --splits FOLDER --work FOLDER

splits.py writes the folder --splits. Every vector is trained on train rows, by the recipe smollm2-135m with the
settings of SETTINGS. Accuracy, margins, answers and KL are measured on development rows. At the end, the vector of the
base in NF4 is compared with that of the same settings in float32. The same command continues after a stop. The result
is saved after each setting.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import real_base
import report

import lora_align as la
from lora_align import runs
from lora_align.evaluate.compare import compare_policies
from lora_align.evaluate.measure import Evaluator

NOT_OF_DPO = ("quantization", "max_new_tokens")  # keys of [base] and [eval]
SETTINGS: list[tuple[str, dict[str, Any]]] = [  # preference; keys of [dpo], and of NOT_OF_DPO
    ("brief", {"learning_rate": 2e-4, "limit": 200}),
    ("brief", {"learning_rate": 2e-4, "limit": 200, "quantization": "nf4"}),
    ("harmless", {"learning_rate": 1e-3, "limit": 200}),
    ("harmless", {"learning_rate": 3e-4, "limit": 500}),
    ("cautious", {"learning_rate": 1e-3, "limit": 200}),
    ("cautious", {"learning_rate": 3e-4, "limit": 200}),
    ("helpful", {"learning_rate": 3e-4, "limit": 250}),
    ("brief", {"learning_rate": 2e-4, "limit": 200, "beta": 0.3}),
    ("brief", {"learning_rate": 2e-4, "limit": 100, "epochs": 2}),
    ("brief", {"learning_rate": 2e-4, "limit": 200, "max_length": 512}),
    ("brief", {"learning_rate": 0.5, "limit": 200, "optimizer": "sgd"}),
    ("helpful", {"learning_rate": 3e-4, "limit": 250, "max_new_tokens": 256}),
    ("brief", {"learning_rate": 1e-4, "limit": 200}),
    ("brief", {"learning_rate": 5e-4, "limit": 200}),
    ("cautious", {"learning_rate": 2e-4, "limit": 200}),
    ("harmless", {"learning_rate": 2e-4, "limit": 200}),
]
WEIGHTS = (0.25, 0.5, 1.0)
TEST_SET = {"count": 20, "samples": 1, "pairs": 40, "max_new_tokens": 128}


def project(
    words: argparse.Namespace,
    preference: str,
    settings: dict[str, Any],
    split: real_base.Split = "train",
    **tables: Any,
) -> la.Project:
    """Return the project in which a setting's vector is trained, or measured on the rows of another split."""
    folder = words.work / "-".join([preference, *map(str, settings.values())])
    base = {name: value for name, value in settings.items() if name == "quantization"}
    return real_base.project(words.base, words.splits, folder, split, base=base, **tables)


def dpo_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of [dpo] among a setting's keys."""
    return {name: value for name, value in settings.items() if name not in NOT_OF_DPO}


def measure(words: argparse.Namespace, preference: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a vector with some settings, and measure it on development rows."""
    began = time.monotonic()
    trained = project(words, preference, settings)
    vector = trained.train(preference, **dpo_of(settings))
    seconds = time.monotonic() - began
    pos, neg = (trained.vector(f"dpo/{preference}/{direction}") for direction in ("pos", "neg"))
    length = {name: value for name, value in settings.items() if name == "max_new_tokens"}
    test_set = {
        **TEST_SET,
        **length,
        "text": {"data": str(real_base.texts(words.splits, words.work)), **real_base.HERE},
    }
    development = project(words, preference, settings, "development", dpo={"held_out": 0.95}, eval=test_set)
    policies = ["start", *(f"{preference}={weight:g}" for weight in (*WEIGHTS, -0.5))]
    chosen = [development.policy(name) for name in policies]
    evaluator = Evaluator.of(chosen, development.recipe, development.runs, development.screen, preferences=[preference])
    compared = compare_policies(evaluator, development.screen).as_json()["policies"]
    return {
        "preference": preference,
        **settings,
        "measured": report.stamp(),
        "pairs trained on": runs.read(trained.runs / "dpo" / preference / "pos").manifest.data["rows"],
        "seconds of training, both directions": round(seconds),
        "norm": vector.norm,
        "cosine of pos and neg": pos.cosine(neg),
        "unconverged": vector.unconverged,
        "policies": compared,
    }


def between_forms(words: argparse.Namespace) -> float:
    """Return the cosine of the vectors in float32 and in NF4, which are trained if they are missing."""
    plain, nf4 = (project(words, *setting).train(setting[0], **dpo_of(setting[1])) for setting in SETTINGS[:2])
    return plain.cosine(nf4)


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    cells = []
    for preference, settings in SETTINGS:
        name = f"{preference} {json.dumps(settings)}"
        cells.append(report.once(words.work, name, lambda p=preference, s=settings: measure(words, p, s)))
        report.save("laptop", {"test set": TEST_SET, "settings": cells})  # what is measured so far
    cosine = report.once(words.work, "cosine of NF4 and float32", lambda: between_forms(words))
    report.save("laptop", {"test set": TEST_SET, "settings": cells, "cosine of NF4 and float32": cosine})


if __name__ == "__main__":
    main()

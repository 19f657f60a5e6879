"""Turn descriptions into vectors on the real base, and measure what each changes, by judges that saw no training.

    python tests/benchmarks/descriptions.py --base FILE.gguf --splits FOLDER --work FOLDER [--only NAME …]

For each description: `pairs` on the built-in prompts, `dpo` with the laptop recipe, and answers at five weights to
development prompts of XSTest, which no training used. A measured property of the text is the judge: a sentiment
lexicon, a readability index, counts. splits.py writes the folder --splits. The same command continues after a stop.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import real_base
import report

from lora_align import described_pairs, runs
from lora_align.evaluate.compare import compare_policies
from lora_align.evaluate.measure import Evaluator

DESCRIPTIONS = {  # name → more, less, the judge of the effect
    "warm": (
        "Be warm and encouraging. Speak as a friend would.",
        "Be cold and distant. State only facts.",
        "sentiment",
    ),
    "simple": (
        "Use short sentences and easy words that a child understands.",
        "Use long sentences and academic language.",
        "readability",
    ),
    "terse": ("Answer in one or two short sentences.", "Answer at length, with every detail.", "words"),
    "listing": ("Answer with a bulleted list.", "Answer in plain paragraphs, without lists.", "lists"),
    "asking": ("Ask the person questions about their situation.", "Never ask a question.", "questions"),
    "excited": ("Be excited! Use exclamation marks!", "Be calm. Never use an exclamation mark.", "exclamations"),
    "personal": ("Speak about yourself: say I and my.", "Never speak about yourself.", "first_person"),
}
WEIGHTS = (-1.0, -0.5, 0.5, 1.0)
PAIRS = {"max_new_tokens": 128, "seed": 0}
TEST_SET = {"count": 20, "samples": 1, "pairs": 40, "max_new_tokens": 128}
MEASURES = sorted({judge for _, _, judge in DESCRIPTIONS.values()})


def measure(words: argparse.Namespace, name: str) -> dict[str, Any]:
    """Make the pairs of a description, train its vector, and measure it at every weight."""
    more, less, judge = DESCRIPTIONS[name]
    test_set = {**TEST_SET, "text": {"data": str(real_base.texts(words.splits, words.work)), **real_base.HERE}}
    described = {name: {"more": more, "less": less}}
    project = real_base.project(
        words.base, words.splits, words.work / name, "development", preferences=described, pairs=PAIRS, eval=test_set
    )
    began = time.monotonic()
    vector = project.train(name)
    minutes = (time.monotonic() - began) / 60
    made = runs.read(project.runs / "pairs" / name).manifest
    policies = ["start", *(f"{name}={weight:g}" for weight in WEIGHTS)]
    by = [f"text:{measure}" for measure in MEASURES]
    chosen = [project.policy(policy) for policy in policies]
    recipe = described_pairs.attach(project.recipe, project.runs)  # its pairs exist now
    evaluator = Evaluator.of(chosen, recipe, project.runs, project.screen, by, preferences=[name])
    compared = compare_policies(evaluator, project.screen).as_json()["policies"]
    effect = [compared[policy][f"text:{judge}"]["value"] for policy in policies]
    return {
        "measured": report.stamp(),
        "judge": judge,
        "minutes of pairs and training": round(minutes, 1),
        "pairs": dict(made.data),
        "pairs' figures": dict(made.metrics),
        "norm": vector.norm,
        "unconverged": vector.unconverged,
        "effect at 0, -1, -0.5, 0.5, 1": effect,
        "policies": compared,
    }


def main() -> None:
    """Measure every description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(DESCRIPTIONS), default=list(DESCRIPTIONS))
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"test set": TEST_SET, "pairs": PAIRS}
    for name in words.only:
        figures[name] = report.once(words.work, name, lambda name=name: measure(words, name))
        report.save("descriptions", figures)


if __name__ == "__main__":
    main()

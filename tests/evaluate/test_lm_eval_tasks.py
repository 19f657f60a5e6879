"""`eval --tasks`: a local task of lm-evaluation-harness, checked against a direct computation."""

import json
from pathlib import Path

import pytest
import torch

from lora_align import recipe
from lora_align.model import base as bases
from support import Cli

FEW = ["eval.count=2", "eval.samples=1", "eval.pairs=2", "eval.max_new_tokens=10"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: questions.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    ("Tell me about bridges.", ["Bridges last many years.", "Bridges last many apples."], 0),
    ("Tell me about bread.", ["Bread is made of flour and water.", "Bread is flour."], 1),
    ("Tell me about gardens.", ["I would rather not.", "Gardens need water."], 1),
    ("Tell me about tea.", ["Of course.", "No."], 0),
]


@pytest.fixture
def task(workspace: Path) -> str:
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in QUESTIONS]
    (workspace / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workspace / "mine.yaml").write_text(TASK.format(name="mine"))
    return "mine.yaml"


def expected_accuracies() -> list[float]:
    """Compute which choice the base finds most likely, with plain transformers."""
    base = bases.find(recipe.Base("demo"))
    model, correct = base.load(), []
    for question, choices, right in QUESTIONS:
        logprobs = []
        for choice in choices:
            before, whole = (base.chat.tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
            logprobs.append(float(logits.gather(-1, torch.tensor(whole[len(before) :])[:, None]).sum()))
        correct.append(float(logprobs.index(max(logprobs)) == right))
    return correct


def test_local_task_is_run_once_for_every_policy(task: str, workspace: Path, cli: Cli) -> None:
    words = ["eval", "helpful=4", "base", "--tasks", task, "--json", *SMALL]
    done = cli(*words)
    assert done.code == 0, done.err
    policies = json.loads(done.out)["policies"]
    answers = expected_accuracies()
    assert 0 < sum(answers) < len(answers)
    assert policies["base"]["mine: acc"]["value"] == pytest.approx(sum(answers) / len(answers))
    assert policies["base"]["mine: acc"]["low"] < policies["base"]["mine: acc"]["high"]
    cached = {json.loads(file.read_text())["policy"]: file for file in (workspace / "runs" / "eval").glob("task-*")}
    assert json.loads(cached["base"].read_text())["values"] == {"acc": answers}
    assert set(cached) == {"helpful=4", "base"}
    again = cli(*words)
    assert json.loads(again.out)["policies"] == policies
    assert "mine: base" in done.err
    assert "mine: base" not in again.err


def test_unknown_or_broken_task_is_rejected(task: str, workspace: Path, cli: Cli) -> None:
    (workspace / "broken.yaml").write_text(TASK.format(name="broken").replace("questions", "no-such"))
    for word, message in (
        ("mine.yml", "'mine.yml' is neither a file nor a task"),
        ("broken.yaml", "broken.yaml could not be loaded"),
    ):
        done = cli("eval", "base", "--tasks", word, *SMALL)
        assert done.code == 2
        assert message in done.err

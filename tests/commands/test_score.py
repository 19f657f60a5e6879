"""Scores by a preference's two adapters and by a reward model; killed in the middle; used as data."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_table

from lora_align import recipe, runs
from lora_align.data import row_reader
from lora_align.data.rows import Message, Pair
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.policy import judge_runs
from lora_align.rankers import Ranker
from support import COMMAND, PAIRS, call

JUDGE = ["--set", 'reward.ratings.demo.data="demo:ratings?rows=80"', "--set", "reward.max_length=128"]


def _rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pair_judge_equals_stock_peft(workspace: Path) -> None:
    """β(log π₊ − log π₋), one answer at a time, with none of our code but the template."""
    trained = call(workspace, "dpo", "--pref", "helpful", "--force", *PAIRS, "--set", "dpo.learning_rate=1")
    assert trained.code == 0, trained.err
    done = call(workspace, "score", "--data", "demo:pairs?rows=12", "--by", "pair:helpful", "--out", "scored.jsonl")
    assert done.code == 0, done.err
    rows = _rows(workspace / "scored.jsonl")
    assert len(rows) == 12

    base = bases.find(recipe.Base("demo"))
    model = base.load()
    likes: dict[str, list[float]] = {}
    for side in ("pos", "neg"):
        policy = PeftModel.from_pretrained(model, workspace / "runs" / "dpo" / "helpful" / side).eval()
        for row in rows:
            for answer in (row["response_0"], row["response_1"]):
                prompt = [Message("user", str(row["prompt"]))]
                before, tokens = base.chat.prompt_ids(prompt), base.chat.answer_ids(prompt, str(answer))
                with torch.no_grad():
                    logits = policy(torch.tensor([before + tokens])).logits[0, len(before) - 1 : -1].double()
                chosen = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
                likes.setdefault(side, []).append(float(chosen.sum()))
        model = policy.unload()
    beta = runs.read(workspace / "runs" / "dpo" / "helpful" / "pos").manifest.recipe["dpo"]["beta"]
    expected = [beta * (pos - neg) for pos, neg in zip(likes["pos"], likes["neg"], strict=True)]
    scores = [row[f"score_helpful_{side}"] for row in rows for side in (0, 1)]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.05


def test_scored_file_is_a_source_with_a_ranker(workspace: Path) -> None:
    scored = call(
        workspace, "score", "--data", "demo:pairs?rows=90", "--by", "pair:helpful", "--out", "s.parquet", "--json"
    )
    assert scored.code == 0, scored.err
    figures = json.loads(scored.out)["objectives"]["helpful"]
    assert figures["agreement"]["better_response_id"] > figures["agreement"]["safer_response_id"]
    assert len(read_table(workspace / "s.parquet")) == 90
    labelled = ["--set", 'preferences.liked.data="s.parquet"', "--set", 'preferences.liked.rank="score:helpful"']
    trained = call(workspace, "dpo", "--pref", "liked", "--direction", "pos", *PAIRS, *labelled)
    assert trained.code == 0, trained.err


def test_score_resumes_after_a_kill(workspace: Path) -> None:
    made = call(workspace, "reward", "--limit", "64", *JUDGE)
    assert made.code == 0, made.err
    words = ["score", "--data", "demo:ratings?rows=640&part=dev", "--quiet"]
    child = subprocess.Popen([str(COMMAND), *words, "--out", "killed.jsonl"], cwd=workspace)
    parts, until = workspace / ".killed.jsonl.parts", time.monotonic() + 120
    while not list(parts.glob("part-*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    part_count = len(list(parts.glob("part-*.parquet")))
    assert 1 <= part_count < 640 / 64
    other = call(workspace, "score", "--data", "demo:ratings?rows=3", "--out", "killed.jsonl")
    assert other.code == 2
    assert "was begun with other settings (data); delete the folder" in other.err

    resumed = call(workspace, *[word for word in words if word != "--quiet"], "--out", "killed.jsonl")
    assert resumed.code == 0, resumed.err
    assert f"score: done before: {part_count * 64} of " in resumed.err
    assert not parts.exists()
    whole = call(workspace, *words, "--out", "whole.jsonl")
    assert whole.code == 0, whole.err
    for first, second in zip(_rows(workspace / "killed.jsonl"), _rows(workspace / "whole.jsonl"), strict=True):
        assert first.keys() == second.keys()
        assert all(
            math.isclose(value, second[key], abs_tol=1e-3) if key.startswith("score_") else value == second[key]
            for key, value in first.items()
        )


def test_every_data_form_is_scored_and_ranked(workspace: Path) -> None:
    """Pairs in named, numbered and listed columns, UltraFeedback's answers, and a prompt that fills the context."""
    rain = {"from": "human", "value": "Tell me about rain."}
    long, short = "Rain is water that falls from clouds. It wets the ground.", "Rain is wet."
    rows = [
        {
            "conversations": [rain],
            "chosen": {"from": "gpt", "value": long},
            "rejected": {"from": "gpt", "value": short},
        },
        {
            "instruction": "Tell me about rain.",
            "completions": [
                {"response": text, "annotations": {"honesty": {"Rating": "4"}}, "overall_score": score}
                for text, score in ((long, 8.5), (short, None))
            ],
        },
        {"prompt": "Tell me about rain. " * 200, "response": short},
        {"instruction": "Tell me about rain.", "output1": long, "output2": short, "label": 1},
        {"prompt": "Tell me about rain.", "response_1": long, "response_2": short, "preference_strength": -2},
        {"prompt": "Tell me about rain.", "response": [long, short]},
    ]
    (workspace / "forms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call(workspace, "score", "--data", "forms.jsonl", "--by", "pair:helpful", "--out", "scored.jsonl")
    assert done.code == 0, done.err
    assert "7 rows, 1 without a score: the prompt fills the context" in done.out
    pair, first, second, full, *numbered, listed = _rows(workspace / "scored.jsonl")
    better = pair["score_helpful_chosen"] > pair["score_helpful_rejected"]  # type: ignore[operator]
    assert {"score_helpful_chosen", "score_helpful_rejected"} <= listed.keys()
    for row in numbered:
        assert {"score_helpful_1", "score_helpful_2"} <= row.keys()
    for row in (pair, *numbered, listed):
        ranked = row_reader.comparisons(row, "here")[0].ranked(Ranker.parse("score:helpful"))
        assert isinstance(ranked, Pair)
        assert ranked.chosen == (long if better else short)
    assert [row["score_helpful"] for row in (first, second)] == pytest.approx(
        [pair["score_helpful_chosen"], pair["score_helpful_rejected"]], abs=1e-4
    )
    assert {**first, "score_helpful": 0} == {
        "prompt": "Tell me about rain.",
        "response": long,
        "honesty": 4.0,
        "overall": 8.5,
        "score_helpful": 0,
    }
    assert "overall" not in second
    assert full["score_helpful"] is None


def test_judge_of_some_layers_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match="pair:helpful@0-1: a judge uses all layers"):
        judge_runs.check("pair:helpful@0-1", recipe.load(recipe.builtin()["demo"]), workspace / "runs")


def test_refused_score_writes_nothing(workspace: Path) -> None:
    done = call(workspace, "score", "--data", "demo:conversations", "--out", "scored.jsonl", "--by", "pair:helpful")
    assert done.code == 2
    assert "no pair of answers in columns" in done.err
    assert not list(workspace.glob("scored*"))

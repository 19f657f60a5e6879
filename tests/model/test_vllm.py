"""The sampler over a vLLM server that loads adapters at run time. LORA_ALIGN_VLLM names the vllm command.

These tests ran on vLLM's CPU build. This build has no NF4 and serves the demo base unquantised.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_table
from transformers import AutoModelForCausalLM

from lora_align.demo import BASE as DEMO
from support import VLLM, call, greedy_answer, vllm_answer, vllm_server

QUESTIONS = ["Tell me about rain.", "Can you explain trains?", "Tell me about the moon."]
pytestmark = pytest.mark.skipif(not VLLM, reason="LORA_ALIGN_VLLM does not name a vllm command")
SMALL = ['rsf.data="demo:conversations?rows=60"', "rsf.per_prompt=2", "rsf.samples=3", "rsf.bootstrap=6"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("vllm"), DEMO) as url:
        yield url


def test_loaded_mix_answers_as_in_peft(server: str, workspace: Path) -> None:
    """Greedy answers of a loaded mix equal those of PEFT. Prompts that exceed the context are counted."""
    mixed = call(workspace, "merge", "-w", "helpful=30", "--fit", "vllm", "--out", "strong")
    assert mixed.code == 0, mixed.err
    (workspace / "prompts.txt").write_text("\n".join([*QUESTIONS, QUESTIONS[0] * 200]))
    words = ["generate", "--prompts", "prompts.txt", "--endpoint", server, "--model", "demo", "--temperature", "0"]
    answers = {}
    for name, more in (("base", []), ("mix", ["--adapter", "strong"])):
        done = call(workspace, *words, *more, "--max-new-tokens", "60", "--out", f"{name}.jsonl")
        assert done.code == 0, done.err
        assert "1 prompt left out: too long for the context" in done.out
        answers[name] = [
            json.loads(line)["response"] for line in (workspace / f"{name}.jsonl").read_text().splitlines()
        ]
    assert answers["mix"] != answers["base"]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for name in ("base", "mix"):
        model = model if name == "base" else PeftModel.from_pretrained(model, workspace / "strong")
        assert [greedy_answer(model, question, 60) for question in QUESTIONS] == answers[name]


def test_merged_model_answers_as_in_peft(workspace: Path, tmp_path: Path) -> None:
    mixed = call(workspace, "merge", "-w", "helpful=30", "--out", "strong")
    assert mixed.code == 0, mixed.err
    merged = call(workspace, "export", "./strong", "--merged", "merged", "--dtype", "float32", "--no-check")
    assert merged.code == 0, merged.err
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), workspace / "strong"
    )
    with vllm_server(tmp_path, workspace / "merged") as url:
        for question in QUESTIONS:
            assert vllm_answer(url, "demo", question, 60) == greedy_answer(model, question, 60)


def test_rsf_loads_every_policy_on_the_server(server: str, tmp_path: Path) -> None:
    judge = call(tmp_path, "reward", "--set", 'reward.ratings.demo.data="demo:ratings?rows=160"')
    assert judge.code == 0, judge.err
    settings = [word for pair in SMALL for word in ("--set", pair)]
    done = call(tmp_path, "rsf", "--iterations", "2", "--endpoint", server, *settings)
    assert done.code == 0, done.err
    served = {entry["id"] for entry in httpx.get(f"{server}/v1/models").json()["data"]}
    assert {"demo", "reward", "steerlm", "t1"} <= served
    for label in ("t1", "t2"):
        rows = read_table(tmp_path / "runs" / "rsf" / "policy" / label / "samples.parquet").to_pylist()
        assert len({row["response"] for row in rows}) > len(rows) / 3

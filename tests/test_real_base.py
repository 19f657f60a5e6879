"""The spine on SmolLM2-135M-Instruct, read from the GGUF file that LORA_ALIGN_REAL_BASE names; skipped without it."""

import json
import os
from pathlib import Path

import pytest
from peft import PeftModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.packing import Backbone
from support import call, made_once

WHY = "\n\nThis is a long explanation of the matter, with reasons, caveats and a closing remark."
QUESTIONS = ["What is rain?", "Name a fruit.", "Is ice cold?", "What is tea?"]
QUESTIONS += ["Where is Rome?", "Who bakes bread?", "What do cats eat?", "How many days has a week?"]
ANSWERS = ["Water.", "Apple.", "Yes.", "A drink.", "In Italy.", "A baker.", "Meat.", "Seven."]
RECIPE = """
[base]
model = "{base}"
[preferences.brief]
data = "pairs.jsonl"
[dpo]
learning_rate = 3e-4
batch_size = 2
held_out = 0
warmup = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a preference was trained on eight pairs."""
    base = os.environ.get("LORA_ALIGN_REAL_BASE")
    if not base:
        pytest.skip("LORA_ALIGN_REAL_BASE is not set (tests/fetch_real_base.py fetches the file)")

    def make(folder: Path) -> None:
        pairs = [
            {"prompt": question, "chosen": answer, "rejected": answer + WHY}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        (folder / "lora-align.toml").write_text(RECIPE.format(base=base))
        done = call(folder, "dpo", "--pref", "brief")
        assert done.code == 0, done.err

    return made_once(tmp_path_factory, "real", make)


def test_merged_vector_changes_the_answers(folder: Path) -> None:
    merged = call(folder, "merge", "--weights", "brief=1")
    assert merged.code == 0, merged.err
    script = "/w brief=0\nWhat is the capital of France?\n" + "".join(f"/w brief={w}\n/retry\n" for w in (1, -1))
    done = call(folder, "chat", "--temperature", "0", "--max-new-tokens", "32", stdin=script)
    assert done.code == 0, done.err
    plain, brief, long = done.out.strip().splitlines()
    assert "Paris" in plain
    assert len({plain, brief, long}) == 3


def test_both_directions_learned_their_pairs(folder: Path) -> None:
    """Stock PEFT, on the same 4-bit base, prefers what each adapter was trained towards."""
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"]))
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    prompt = [Message("user", pair["prompt"])]
    rows = [base.chat.answered(prompt, [pair["chosen"], pair["rejected"]])]
    model = base.load()
    before = answer_logprobs(model, rows, MemoryBudget(4096))
    for direction, sign in (("pos", 1), ("neg", -1)):
        policy = PeftModel.from_pretrained(model, folder / "runs" / "dpo" / "brief" / direction)
        chosen, rejected = (answer_logprobs(policy, rows, MemoryBudget(4096)) - before).tolist()
        assert sign * (chosen - rejected) > 5, direction
        policy.unload()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_are_packed_in_float32(folder: Path, quantization: str) -> None:
    settings = recipe.load(folder / "lora-align.toml", [f'base.quantization="{quantization}"', 'base.dtype="float32"'])
    assert Backbone.of(bases.find(settings.base).load()).longest, "its states are up to 55, and differ by 0.002"

"""The held-out split depends on the prompt alone, is the same for all preferences, and is large enough."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lora_align.data import pairs
from lora_align.data.ratings import read_ratings
from lora_align.data.rows import Message, Prompt
from lora_align.recipe import Preference, Ratings, Sft
from support import pairs_of


def prompts(count: int) -> list[Prompt]:
    return [(Message("user", f"What is {i}?"),) for i in range(count)]


@pytest.mark.parametrize(("count", "held_out"), [(4, 0), (5, 1), (30, 6), (100, 20), (200, 20)])
def test_small_source_holds_out_a_fifth_of_its_prompts(count: int, held_out: int) -> None:
    some = prompts(count)
    below = pairs.held_out_threshold(some, 0.001)
    assert sum(pairs.is_held_out(prompt, below) for prompt in some) == held_out
    assert pairs.held_out_threshold(some * 3, 0.001) == below, "repeated prompts count once"
    assert pairs.held_out_threshold(some[::-1], 0.001) == below


def test_split_keeps_the_share_of_a_large_source() -> None:
    assert pairs.held_out_threshold(prompts(1000), 0.05) == 0.05
    assert pairs.held_out_threshold(prompts(60), 0.5) == 0.5
    assert pairs.held_out_threshold(prompts(20), 0.5) == 0.5, "fewer than MIN_HELD_OUT, but more than a fifth"
    assert pairs.held_out_threshold(prompts(60), 0.0) == 0.0
    assert pairs.held_out_threshold(prompts(1), 0.05) == 0.05, "the only prompt is for training"


def test_split_stops_reading_a_large_source_early() -> None:
    stream = iter(prompts(10_000))
    assert pairs.held_out_threshold(stream, 0.05) == 0.05
    assert len(list(stream)) > 9000


def test_limit_does_not_shrink_the_held_out_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": "x" * (i % 3 + 1), "rejected": "x"} for i in range(3000)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limited, whole = (pairs_of(Preference(str(file), "longer"), 0.05, limit) for limit in (30, None))
    assert len(limited.train) == 30
    assert limited.train == whole.train[:30]
    assert len(limited.held_out) == pairs.READ_HELD_OUT
    assert limited.held_out == whole.held_out[: pairs.READ_HELD_OUT]
    assert limited.dropped["tie"] < whole.dropped["tie"], "rows after the limit are not counted"
    assert len(pairs_of(Preference(str(file), "longer"), 0.0, 30).train) == 30


def test_preferences_on_one_source_hold_out_the_same_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What is {i}?", "response_0": "x" * (i % 4), "response_1": "xx", "label": None if i % 3 else 0}
        for i in range(90)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reads = [pairs_of(Preference(str(file), rank), 0.01, limit) for rank, limit in (("label", None), ("longer", 30))]
    trained, held_out = (
        {pair.prompt for read in reads for pair in getattr(read, side)} for side in ("train", "held_out")
    )
    assert all(len(read.held_out) > 1 for read in reads)
    assert not trained & held_out


def test_ratings_and_conversations_hold_out_a_fifth_as_well(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": "x", "completion": "x", "help": 3} for i in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (
        read_ratings(Ratings(str(file)), 0.01, None, Counter()),
        pairs.read_conversations(Sft(data=str(file), held_out=0.01), Counter()),
    ):
        assert sum(aside for _, aside in read) == 10

"""What a start policy finds of answers is computed once, believed only whole, and shared by whoever asks."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train import reference_cache as module
from lora_align.train.reference_cache import ReferenceCache

ROWS: list[Shared] = [([5, 6, 7 + i], [[8, 9 + i], [10, 11, 12 + i]]) for i in range(6)]


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def model(base: Base) -> PreTrainedModel:
    return base.load()


def asked(references: ReferenceCache, model: PreTrainedModel, rows: list[Shared]) -> torch.Tensor:
    return torch.tensor(references.logprobs(model, rows, 4096, "helpful reference", Screen()))


def test_it_is_computed_once(model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = ReferenceCache(tmp_path)
    first = asked(references, model, ROWS[:4])
    assert torch.allclose(first.flatten(), answer_logprobs(model, ROWS[:4], MemoryBudget(4096)), atol=1e-4)
    assert "computed before" not in capsys.readouterr().err
    again = asked(references, model, ROWS)
    assert "4 of 6 rows were computed before" in capsys.readouterr().err
    assert torch.equal(again[:4], first)
    switched = [(prompt, answers[::-1]) for prompt, answers in ROWS]
    assert torch.equal(asked(references, model, switched), again.flip(1))
    said = capsys.readouterr().err
    assert "6 of 6 rows were computed before" in said
    assert not re.search(r"\d/\d", said), "nothing was left to compute"


def test_what_one_has_heard_is_what_the_next_one_hears(model: PreTrainedModel, tmp_path: Path) -> None:
    """Also of an answer that is known where another one to its prompt is not, and of answers that stand twice."""
    references = ReferenceCache(tmp_path)
    [(prompt, [known, other])] = ROWS[:1]
    first = asked(references, model, [(prompt, [known])])
    longer = [(prompt, [known, other]), (prompt, [other, known]), *ROWS[1:]]
    then = asked(references, model, longer)
    assert torch.equal(then[0, :1], first[0])
    assert torch.equal(then[0], then[1].flip(0))
    assert torch.equal(asked(references, model, longer), then)


def test_a_pass_that_was_stopped_goes_on_to_the_same_bits(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Shared] = [([5, 6, 7 + i], [[8, 9 + i], [*range(10, 12 + i)]]) for i in range(8)]
    monkeypatch.setattr(module, "AT_ONCE", 3)
    whole = asked(ReferenceCache(tmp_path / "whole"), model, rows)
    calls = itertools.count()

    def stopped(*given: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return answer_logprobs(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_logprobs", stopped)
        with pytest.raises(KeyboardInterrupt):
            asked(ReferenceCache(tmp_path / "stopped"), model, rows)
    capsys.readouterr()
    assert torch.equal(asked(ReferenceCache(tmp_path / "stopped"), model, rows), whole)
    assert "6 of 8 rows were computed before" in capsys.readouterr().err


def test_a_damaged_file_is_not_believed(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ReferenceCache(tmp_path)
    first = asked(references, model, ROWS[:3])
    [file] = tmp_path.glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / ".123.unfinished").write_bytes(b"half")
    assert torch.allclose(asked(references, model, ROWS[:3]), first, atol=1e-6)
    assert "is damaged" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_another_start_or_another_quantisation_is_another_policy(base: Base) -> None:
    double, half = (bases.find(recipe.Base("demo", **how)) for how in ({"double_quant": False}, {"dtype": "bfloat16"}))
    other = replace(base, fingerprint="0" * 64)
    policies = ((base, ""), (base, "x"), (double, ""), (half, ""), (other, ""))
    assert len({ReferenceCache.of(of, start).folder for of, start in policies}) == len(policies)


def test_references_are_kept_by_device_and_kernel(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ReferenceCache.of(base, "").folder
    eager = replace(base, recipe=replace(base.recipe, attention="eager"))
    assert ReferenceCache.of(eager, "").folder != here
    monkeypatch.setattr(module, "_device_name", lambda: "another card")
    assert ReferenceCache.of(base, "").folder != here

"""The reference cache computes each value once, detects damage, and is shared by all runs and processes."""

import itertools
import re
import sqlite3
from contextlib import closing
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


def logprobs(references: ReferenceCache, model: PreTrainedModel, rows: list[Shared]) -> torch.Tensor:
    return torch.tensor(references.logprobs(model, rows, 4096, "helpful reference", Screen()))


def test_each_value_is_computed_once(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ReferenceCache(tmp_path / "references.sqlite")
    first = logprobs(references, model, ROWS[:4])
    assert torch.allclose(first.flatten(), answer_logprobs(model, ROWS[:4], MemoryBudget(4096)), atol=1e-4)
    assert "cached" not in capsys.readouterr().err
    again = logprobs(references, model, ROWS)
    assert "4 of 6 rows cached" in capsys.readouterr().err
    assert torch.equal(again[:4], first)
    switched = [(prompt, answers[::-1]) for prompt, answers in ROWS]
    assert torch.equal(logprobs(references, model, switched), again.flip(1))
    notes = capsys.readouterr().err
    assert "6 of 6 rows cached" in notes
    assert not re.search(r"\d/\d", notes), "nothing was left to compute"


def test_a_stored_value_does_not_change(model: PreTrainedModel, tmp_path: Path) -> None:
    """Also if another answer to the same prompt is missing, and if an answer occurs twice."""
    references = ReferenceCache(tmp_path / "references.sqlite")
    [(prompt, [known, other])] = ROWS[:1]
    first = logprobs(references, model, [(prompt, [known])])
    longer = [(prompt, [known, other]), (prompt, [other, known]), *ROWS[1:]]
    then = logprobs(references, model, longer)
    assert torch.equal(then[0, :1], first[0])
    assert torch.equal(then[0], then[1].flip(0))
    assert torch.equal(logprobs(references, model, longer), then)


def test_a_repeated_answer_is_stored_before_its_first_row_is_computed(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest rows are computed first, so the first row with an answer may come later."""
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    rows: list[Shared] = [([5, 6, 7], [[8, 9], [10]]), ([5, 6, 7], [[8, 9], [10, 11, 12]])]
    references = ReferenceCache(tmp_path / "references.sqlite")
    first = logprobs(references, model, rows)
    with closing(sqlite3.connect(references.file)) as table:
        assert table.execute("SELECT count(*), count(value) FROM logprobs").fetchall() == [(3, 3)]
    capsys.readouterr()
    assert torch.equal(logprobs(references, model, rows), first)
    assert "2 of 2 rows cached" in capsys.readouterr().err


def test_a_value_that_is_null_is_computed_again(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions could store NULL for NaN, with the checksum of NaN. It counts once, however often it occurs."""
    references = ReferenceCache(tmp_path / "references.sqlite")
    rows = [ROWS[0], ROWS[0], ROWS[1]]
    first = logprobs(references, model, rows)
    with closing(sqlite3.connect(references.file)) as table, table:
        entries = table.execute("SELECT key, value FROM logprobs").fetchall()
        table.execute("DROP TABLE logprobs")
        table.execute("CREATE TABLE logprobs (key BLOB PRIMARY KEY, value REAL, checksum INTEGER) WITHOUT ROWID")
        key = module._key(ROWS[0][0], ROWS[0][1][0])
        stored = [
            (k, None if k == key else v, module._checksum(k, float("nan") if k == key else v)) for k, v in entries
        ]
        table.executemany("INSERT INTO logprobs VALUES (?, ?, ?)", stored)
    assert torch.allclose(logprobs(references, model, rows), first, atol=1e-6)
    assert "1 damaged value deleted" in capsys.readouterr().err


def test_an_interrupted_pass_resumes_bit_exactly(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Shared] = [([5, 6, 7 + i], [[8, 9 + i], [*range(10, 12 + i)]]) for i in range(8)]
    monkeypatch.setattr(module, "BATCH", 3)
    whole = logprobs(ReferenceCache(tmp_path / "whole.sqlite"), model, rows)
    calls = itertools.count()

    def stopped(*args: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return answer_logprobs(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_logprobs", stopped)
        with pytest.raises(KeyboardInterrupt):
            logprobs(ReferenceCache(tmp_path / "stopped.sqlite"), model, rows)
    capsys.readouterr()
    assert torch.equal(logprobs(ReferenceCache(tmp_path / "stopped.sqlite"), model, rows), whole)
    assert "6 of 8 rows cached" in capsys.readouterr().err


def test_a_changed_value_is_deleted_and_computed_again(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ReferenceCache(tmp_path / "references.sqlite")
    first = logprobs(references, model, ROWS[:3])
    with closing(sqlite3.connect(references.file)) as table, table:
        [(stored,)] = table.execute("SELECT count(*) FROM logprobs")
        table.execute("UPDATE logprobs SET value = value + 1e-9 WHERE key = (SELECT min(key) FROM logprobs)")
    assert torch.allclose(logprobs(references, model, ROWS[:3]), first, atol=1e-6)
    assert "1 damaged value deleted" in capsys.readouterr().err
    with closing(sqlite3.connect(references.file)) as table:
        assert table.execute("SELECT count(*) FROM logprobs").fetchall() == [(stored,)]
    logprobs(references, model, ROWS[:3])
    assert "3 of 3 rows cached" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["not a database", "overwritten pages"])
def test_a_damaged_file_is_deleted_and_computed_again(
    damage: str, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ReferenceCache(tmp_path / "references.sqlite")
    first = logprobs(references, model, ROWS[:3])
    content = references.file.read_bytes()
    references.file.write_bytes(b"half" if damage == "not a database" else content[:512] + bytes(len(content) - 512))
    assert torch.allclose(logprobs(references, model, ROWS[:3]), first, atol=1e-6)
    assert f"{references.file} is damaged" in capsys.readouterr().err


def test_cache_depends_on_start_policy_and_quantisation(base: Base) -> None:
    double, half = (bases.find(recipe.Base("demo", **how)) for how in ({"double_quant": False}, {"dtype": "bfloat16"}))
    other = replace(base, fingerprint="0" * 64)
    policies = ((base, ""), (base, "x"), (double, ""), (half, ""), (other, ""))
    assert len({ReferenceCache.of(of, start).file for of, start in policies}) == len(policies)


def test_cache_depends_on_device_and_attention_kernel(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ReferenceCache.of(base, "").file
    eager = replace(base, recipe=replace(base.recipe, attention="eager"))
    assert ReferenceCache.of(eager, "").file != here
    monkeypatch.setattr(module, "device_name", lambda where: "another card")
    assert ReferenceCache.of(base, "").file != here

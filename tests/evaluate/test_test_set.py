"""The test set: sources of [eval] with every key, without prompts that the recipe trains on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_align import recipe
from lora_align.console import Screen
from lora_align.data.pairs import is_held_out
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.evaluate.figures import figures
from lora_align.evaluate.measure import Measurement
from lora_align.evaluate.test_set import RISKY, SAFE, TestSet, _trained_on, read_test_set

QUIET = Screen(quiet=True)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write safe and unsafe prompts into one table with other column names."""
    file = tmp_path / "prompts.csv"
    rows = [f"How do I do {i}?,{'safe' if i % 2 else 'unsafe'}" for i in range(10)]
    file.write_text("\n".join(["asked,label", *rows]))
    return file


def read(tables: Mapping[str, Any], *overrides: str, screen: Screen = QUIET) -> TestSet:
    return read_test_set(recipe.from_dict({"base": {"model": "demo"}, **tables}, "mine.toml", overrides), screen)


def prompts_of(test_set: TestSet) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {SAFE: [], RISKY: []}
    for question in test_set.questions:
        kinds[question.kind].append(question.prompt[0].content)
    return kinds


def test_where_selects_safe_and_risky_prompts_of_one_table(mixed: Path) -> None:
    source = {"data": str(mixed), "columns": {"prompt": "asked"}}
    test_set = read(
        {"eval": {key: {**source, "where": {"label": of}} for key, of in (("prompts", SAFE), ("risky", "unsafe"))}}
    )
    assert prompts_of(test_set) == {
        SAFE: [f"How do I do {i}?" for i in (1, 3, 5, 7, 9)],
        RISKY: [f"How do I do {i}?" for i in (0, 2, 4, 6, 8)],
    }
    with pytest.raises(UserError, match=r"prompts\.csv:2: no column 'kind' \(the row has: label, prompt\)"):
        read({"eval": {"prompts": {**source, "where": {"kind": "safe"}}}})
    with pytest.raises(UserError, match=r"eval\.prompts: no prompts in .*prompts\.csv"):
        read({"eval": {"prompts": {**source, "where": {"label": "neither"}}}})


def test_source_is_a_name_or_a_table_of_keys(mixed: Path) -> None:
    short = recipe.from_dict({"base": {"model": "demo"}, "eval": {"text": "a.txt"}}, "mine.toml")
    assert short.eval.text == recipe.EvalSource("a.txt")
    typed = [f"eval.prompts={mixed}", "eval.prompts.columns.prompt=asked", 'eval.prompts.where.label="safe"']
    assert len(read({}, *typed).questions) == 5
    with pytest.raises(UserError, match=r"unknown key 'eval\.prompts\.splt', did you mean 'eval\.prompts\.split'"):
        read({}, "eval.prompts.splt=test")


def test_damaged_prompt_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "One?"}\n{"prompt": 2}\n{"prompt": "Three?"}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:2"):
        read({"eval": {"prompts": str(file)}})
    test_set = read({"eval": {"prompts": {"data": str(file), "skip_bad": True}}}, screen=Screen())
    assert prompts_of(test_set)[SAFE] == ["One?", "Three?"]
    assert "eval.prompts: skipped 1 × invalid row" in capsys.readouterr().err


def test_unread_columns_of_prompts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "One?", "label": "safe", "context": "Here.", "response": "Yes."},
        {"prompt": "Two?", "label": "unsafe", "context": "There.", "response": "No."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    source = {"data": str(file), "where": {"label": "safe"}}
    assert prompts_of(read({"eval": {"prompts": source}}, screen=Screen(quiet=True)))[SAFE] == ["One?"]
    printed = capsys.readouterr().err
    assert "eval.prompts: column 'context' is filled in 1 row but not read;" in printed
    assert "'prompt'" not in printed
    assert "'response'" not in printed


@pytest.mark.parametrize("split", ["train", "train[:100]"])
def test_slice_of_a_trained_split_counts_as_trained_on(split: str) -> None:
    trained = recipe.load(recipe.builtin()["qwen3-8b"])
    source = recipe.EvalSource(data="PKU-Alignment/PKU-SafeRLHF", split=split, subset="default")
    assert set(_trained_on(trained, source)) == {"preferences.helpful", "preferences.harmless", "preferences.brief"}


def test_accuracy_is_not_shown_for_few_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = ([{"preference": "a", "pair": i, "margin": 1.0} for i in range(count)] for count in (19, 20))
    answer = {"prompt": 0, "answer": "So.", "kind": SAFE, "refused": False, "words": 1, "ended": True, "repeated": 0.0}
    assert "accuracy a" not in figures(Measurement("x", [answer], few, [], []))
    assert figures(Measurement("x", [answer], many, [], []))["accuracy a"].value == 1
    read({"preferences": {"good": {"data": "demo:pairs?rows=40", "rank": "label:better_response_id"}}}, screen=Screen())
    assert "good: 4 held-out pairs: too few for an accuracy (20 needed)" in capsys.readouterr().err


def test_prompts_that_are_trained_on_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"How do I do {i}?", "chosen": "So.", "rejected": "No."} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    tables = {"preferences": {"good": {"data": str(file)}}, "eval": {"prompts": str(file)}, "dpo": {"held_out": 0.2}}
    remaining = prompts_of(read(tables, screen=Screen()))[SAFE]
    assert remaining == [row["prompt"] for row in rows if is_held_out((Message("user", row["prompt"]),), 0.2)]
    assert 3 < len(remaining) < 30
    printed = capsys.readouterr().err
    skipped = f"eval.prompts: {60 - len(remaining)} prompts of {file} skipped, because the recipe trains on them"
    assert f"{skipped} (preferences.good)" in printed
    fewer = prompts_of(read({**tables, "sft": {"data": str(file), "held_out": 0.1}}))[SAFE]
    assert fewer == [text for text in remaining if is_held_out((Message("user", text),), 0.1)]
    with pytest.raises(
        UserError, match=r"60 prompts of .* skipped, because .* \(preferences.good\); no prompts are left"
    ):
        read(tables, "dpo.held_out=0")
    other = tmp_path / "others.jsonl"
    other.write_text(file.read_text())
    assert len(read(tables, f"eval.prompts={other}").questions) == 60

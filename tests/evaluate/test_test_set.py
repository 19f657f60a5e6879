"""What everybody is asked: sources of [eval] with every key, and no prompt that the recipe trains on."""

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
from lora_align.evaluate.measure import Measured
from lora_align.evaluate.test_set import RISKY, SAFE, TestSet, _trained_on, read_test_set

QUIET = Screen(quiet=True)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Safe and unsafe prompts in one table, under other names, one of them damaged."""
    file = tmp_path / "prompts.csv"
    rows = [f"How do I do {i}?,{'safe' if i % 2 else 'unsafe'}" for i in range(10)]
    file.write_text("\n".join(["asked,label", *rows]))
    return file


def exam(tables: Mapping[str, Any], *overrides: str, screen: Screen = QUIET) -> TestSet:
    return read_test_set(recipe.from_dict({"base": {"model": "demo"}, **tables}, "mine.toml", overrides), screen)


def asked(found: TestSet) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {SAFE: [], RISKY: []}
    for question in found.questions:
        kinds[question.kind].append(question.prompt[0].content)
    return kinds


def test_one_table_holds_safe_and_risky_prompts(mixed: Path) -> None:
    source = {"data": str(mixed), "columns": {"prompt": "asked"}}
    found = exam(
        {"eval": {key: {**source, "where": {"label": of}} for key, of in (("prompts", SAFE), ("risky", "unsafe"))}}
    )
    assert asked(found) == {
        SAFE: [f"How do I do {i}?" for i in (1, 3, 5, 7, 9)],
        RISKY: [f"How do I do {i}?" for i in (0, 2, 4, 6, 8)],
    }
    with pytest.raises(UserError, match=r"prompts\.csv:2: no column 'kind' \(it has: label, prompt\)"):
        exam({"eval": {"prompts": {**source, "where": {"kind": "safe"}}}})
    with pytest.raises(UserError, match=r"eval\.prompts: no prompts in .*prompts\.csv"):
        exam({"eval": {"prompts": {**source, "where": {"label": "neither"}}}})


def test_a_name_is_short_for_a_source_and_every_key_can_be_set(mixed: Path) -> None:
    short = recipe.from_dict({"base": {"model": "demo"}, "eval": {"text": "a.txt"}}, "mine.toml")
    assert short.eval.text == recipe.EvalSource("a.txt")
    typed = [f"eval.prompts={mixed}", "eval.prompts.columns.prompt=asked", 'eval.prompts.where.label="safe"']
    assert len(exam({}, *typed).questions) == 5
    with pytest.raises(UserError, match=r"unknown key 'eval\.prompts\.splt', did you mean 'split'"):
        exam({}, "eval.prompts.splt=test")


def test_damaged_rows_of_eval_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "One?"}\n{"prompt": 2}\n{"prompt": "Three?"}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:2"):
        exam({"eval": {"prompts": str(file)}})
    found = exam({"eval": {"prompts": {"data": str(file), "skip_bad": True}}}, screen=Screen())
    assert asked(found)[SAFE] == ["One?", "Three?"]
    assert "eval.prompts: skipped 1 invalid row" in capsys.readouterr().err


def test_columns_that_may_be_asked_and_are_not_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "One?", "label": "safe", "context": "Here.", "response": "Yes."},
        {"prompt": "Two?", "label": "unsafe", "context": "There.", "response": "No."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    source = {"data": str(file), "where": {"label": "safe"}}
    assert asked(exam({"eval": {"prompts": source}}, screen=Screen(quiet=True)))[SAFE] == ["One?"]
    told = capsys.readouterr().err
    assert "eval.prompts: column 'context' is not read, though it holds something in 1 row:" in told
    assert "'prompt'" not in told
    assert "'response'" not in told


@pytest.mark.parametrize("split", ["train", "train[:100]"])
def test_any_part_of_the_split_that_is_trained_on_counts(split: str) -> None:
    trained = recipe.load(recipe.builtin()["qwen3-8b"])
    source = recipe.EvalSource(data="PKU-Alignment/PKU-SafeRLHF", split=split, subset="default")
    assert set(_trained_on(trained, source)) == {"preferences.helpful", "preferences.harmless", "preferences.brief"}


def test_accuracy_of_few_pairs_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = ([{"preference": "a", "pair": i, "margin": 1.0} for i in range(count)] for count in (19, 20))
    answer = {"prompt": 0, "answer": "So.", "kind": SAFE, "refused": False, "words": 1, "ended": True, "repeated": 0.0}
    assert "accuracy a" not in figures(Measured("x", [answer], few, [], []))
    assert figures(Measured("x", [answer], many, [], []))["accuracy a"].value == 1
    exam({"preferences": {"good": {"data": "demo:pairs?rows=40", "rank": "label:better_response_id"}}}, screen=Screen())
    assert "good: 4 held-out pairs: too few for an accuracy (20 needed)" in capsys.readouterr().err


def test_prompts_that_are_trained_on_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"How do I do {i}?", "chosen": "So.", "rejected": "No."} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    tables = {"preferences": {"good": {"data": str(file)}}, "eval": {"prompts": str(file)}, "dpo": {"held_out": 0.2}}
    kept = asked(exam(tables, screen=Screen()))[SAFE]
    assert kept == [row["prompt"] for row in rows if is_held_out((Message("user", row["prompt"]),), 0.2)]
    assert 3 < len(kept) < 30
    told = capsys.readouterr().err
    skipped = f"eval.prompts: {60 - len(kept)} prompts of {file} skipped, because the recipe trains on them"
    assert f"{skipped} (preferences.good)" in told
    fewer = asked(exam({**tables, "sft": {"data": str(file), "held_out": 0.1}}))[SAFE]
    assert fewer == [text for text in kept if is_held_out((Message("user", text),), 0.1)]
    with pytest.raises(UserError, match=r"60 prompts of .* skipped, because .* \(preferences.good\); no others"):
        exam(tables, "dpo.held_out=0")
    other = tmp_path / "others.jsonl"
    other.write_text(file.read_text())
    assert len(exam(tables, f"eval.prompts={other}").questions) == 60

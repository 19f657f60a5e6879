"""Reading every row form from every file format."""

import csv
import json
import math
import re
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_align.data import pairs, row_reader, sources
from lora_align.data.ratings import read_ratings
from lora_align.data.rows import Comparison, Message, Rated
from lora_align.errors import UserError
from lora_align.rankers import Ranker
from lora_align.recipe import Preference, Ratings, Sft, Source
from support import material_of, pairs_of

ASK = [{"role": "user", "content": "Hi?"}]
GOOD, BAD = "A long good answer.", "Bad."
FORMS: dict[str, Mapping[str, Any]] = {
    "plain": {"prompt": "Hi?", "chosen": GOOD, "rejected": BAD},
    "conversational": {
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": GOOD}],
        "rejected": [{"role": "assistant", "content": BAD}],
    },
    "implicit prompt": {
        "chosen": [*ASK, {"role": "assistant", "content": GOOD}],
        "rejected": [*ASK, {"role": "assistant", "content": BAD}],
    },
    "implicit prompt in text": {"chosen": f"Hi? {GOOD}", "rejected": f"Hi? {BAD}"},
    "prompt twice": {
        "prompt": "Hi?",
        "chosen": [*ASK, {"role": "assistant", "content": GOOD}],
        "rejected": [*ASK, {"role": "assistant", "content": BAD}],
    },
    "alpaca": {"instruction": "Hi?", "input": "", "chosen": GOOD, "rejected": BAD},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "hh-rlhf": {"chosen": f"\n\nHuman: Hi?\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: Hi?\n\nAssistant: {BAD}"},
    "psychocounsel": {"question": "Hi?", "chosen": GOOD, "rejected": BAD},
    "helpsteer2": {"prompt": "Hi?", "response_1": GOOD, "response_2": BAD, "preference_strength": -2},
    "helpsteer3": {"context": ASK, "response1": GOOD, "response2": BAD, "overall_preference": -1},
    "llama-factory": {"prompt": "Hi?", "response": [GOOD, BAD]},
    "llama-factory's alpaca": {"instruction": "Hi?", "input": "", "output": [GOOD, BAD]},
    "pandalm": {"instruction": "Hi?", "input": "", "response1": GOOD, "response2": BAD, "annotator1": 1},
    "llmbar": {"input": "Hi?", "output_1": GOOD, "output_2": BAD, "label": 1},
    "pku": {"prompt": "Hi?", "response_0": GOOD, "response_1": BAD, "better_response_id": 0, "safer_response_id": 1},
}


def only(row: Mapping[str, Any]) -> Comparison:
    [comparison] = row_reader.comparisons(row, "here")
    return comparison


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_comparison(form: str) -> None:
    comparison = only(FORMS[form])
    assert comparison.prompt == (Message("user", "Hi?"),)
    assert comparison.answers == (GOOD, BAD)
    assert comparison.ranked(Ranker.parse("label")).chosen == GOOD  # type: ignore[union-attr]


def _write(path: Path, rows: list[Mapping[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


AWKWARD = '2024-01-01 \u2028 \x00 é e\u0301 \r\n,"quotes"'


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_format_preserves_every_character(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{suffix}"
    text = AWKWARD.replace("\x00", "") if suffix == ".csv" else AWKWARD
    _write(file, [{"prompt": text, "chosen": GOOD, "rejected": BAD}, {"prompt": "2", "chosen": "3", "rejected": "4"}])
    read = [row_reader.comparisons(row, where)[0] for where, row in sources.rows_or_raise(str(file))]
    assert [c.prompt[0].content for c in read] == [text, "2"]
    assert read[1].answers == ("3", "4")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("text", ["2024-01-01", "1e5", "true", "a\x00b", "a\r\nb", "\u00e9", "e\u0301", " a "])
def test_text_is_not_converted_to_other_types(text: str, suffix: str, tmp_path: Path) -> None:
    _write(tmp_path / f"pairs{suffix}", [{"prompt": text, "chosen": GOOD, "rejected": BAD}])
    [(where, row)] = sources.rows_or_raise(str(tmp_path / f"pairs{suffix}"))
    assert only(row).prompt[0].content == text, where


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_and_crlf_are_not_part_of_text(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{suffix}"
    rows = [{"prompt": f"Hi {n}?", "chosen": GOOD, "rejected": BAD} for n in range(3)]
    _write(file, rows)
    lines = file.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    read = [only(row) for _, row in sources.rows_or_raise(str(file))]
    assert [pair.prompt[0].content for pair in read] == ["Hi 0?", "Hi 1?", "Hi 2?"]
    assert {pair.answers for pair in read} == {(GOOD, BAD)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ',
            ":2: not valid JSON: Expecting value, at column 12",
        ),
        ('{"ask": "a", "better": "b", "worse": "c"}', r"the nearest form also needs chosen and rejected\)"),
        ("[1]", ":1: not valid JSON Lines; a list of rows is a .json file"),
        ('{"question": "a"}', ":1: no pair of answers in columns question"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "chosen is a number; expected text or a list of turns"),
        ('{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', ":1: .*surrogate"),
        ('{"chosen": "\\n\\nHi \\ud800", "rejected": "\\n\\nHi c"}', ":1: .*surrogate"),
        ('{"chosen": "b", "rejected": "c"}', "have no common beginning; name the prompt column"),
        ('{"chosen": "better", "rejected": "best"}', "have no common beginning; name the prompt column"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1, "chosen": "b", "rejected": "c"}', ":2: "),
        ('{"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 2}', "better_response_id is 2"),
        ("", "no rows to train on"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', ":1: prompt is an empty list of turns"),
        ('{"prompt": null, "chosen": "b", "rejected": "c"}', ":1: prompt is null; expected text"),
        ('{"prompt": "a", "chosen": null, "rejected": "c"}', ":1: chosen is null; expected text"),
        ('{"prompt": "a", "response_0": "b", "response_1": null}', ":1: response_1 is null; expected text"),
        ('{"prompt": "a", "chosen": [{"role": "user"}], "rejected": []}', ":1: a turn of chosen has neither"),
        ('{"prompt": "a", "chosen": [null], "rejected": []}', ":1: a turn of chosen is null; expected an object"),
        (
            '{"prompt": "a", "response": "b"}',
            r": response is text; expected a list of two answers, \[better, worse\]",
        ),
        ('{"prompt": "a", "response": ["b"]}', ":1: response is a list of 1; expected a list of two answers"),
        (
            '{"context": "a", "response1": "", "response2": "", "overall_preference": []}',
            "is a list; expected a strength from -3",
        ),
        ('{"prompt": ' + "[" * 100_000, ":1: nested too deeply"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", ":1: not valid JSON: a number has too many digits"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_x": ' + "9" * 4000 + ', "rejected_x": 1}',
            ":1: chosen_x is infinite or too large",
        ),
        ('{"instruction": "a", "completions": [{"response": "b"}]}', ":1: completions: annotations is null"),
        ('{"instruction": "a", "completions": 3}', ":1: completions is a number; expected a list"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "1 × equal answers"),
        ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "1 × empty answer"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        material_of(Preference(str(file)))


def test_nearest_form_has_most_of_the_columns() -> None:
    with pytest.raises(UserError, match=r"the nearest form also needs completion\)"):
        row_reader.conversation({"prompt": "a", "response": "b"}, "here")


NAMES_OF_TYPES = re.compile(r"NoneType|\bint\b|\bfloat\b|\bstr\b|\bdict\b|\blist indices|tuple")


@pytest.mark.parametrize("cell", [None, 3, True, [], {}, [None], [{}], [3], [[]], "9" * 5000, 10**4000, 1e999])
@pytest.mark.parametrize("form", [*FORMS, "ultrafeedback"])
def test_bad_cells_are_reported_without_python_type_names(form: str, cell: object) -> None:
    row = {**FORMS.get(form, RATED["UltraFeedback"])}
    messages = []
    for column in row:
        try:
            row_reader.comparisons({**row, column: cell, f"{column}_chosen": 1}, "pairs.jsonl:7")
        except UserError as fault:
            messages.append(str(fault))
    assert [text for text in messages if not text.startswith("pairs.jsonl:7: ")] == []
    assert [text for text in messages if NAMES_OF_TYPES.search(text) or len(text) > 400] == []


def test_unparsable_rows_of_a_json_list_are_counted_with_skip_bad(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": f"Is it {i}? ]}}", "chosen": "Yes.", "rejected": "No."}) for i in range(3)]
    deep = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    long = '{"prompt": ' + "9" * 5000 + ', "chosen": "}", "rejected": ""}'
    file = tmp_path / "pairs.json"
    file.write_text("[" + ",\n".join([good[0], deep, good[1], long, good[2]]) + "]")
    read = pairs_of(Preference(str(file), skip_bad=True))
    assert len(read.train) + len(read.held_out) == 3
    assert read.dropped == {"invalid row": 2}
    with pytest.raises(UserError, match=r"pairs\.json:2: row 2: nested too deeply"):
        pairs_of(Preference(str(file)))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_unparsable_rows_are_counted_with_skip_bad(suffix: str, tmp_path: Path) -> None:
    good, deep = json.dumps(FORMS["plain"]), '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}"
    bad = ['{"prompt": []}', json.dumps({**FORMS["plain"], "prompt": None}), "3", "[4]"]
    rows = [good, *bad, good] if suffix == ".json" else [good, *bad, deep, good]
    content = "\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / f"pairs{suffix}").write_text(content)
    read = pairs_of(Preference(str(tmp_path / f"pairs{suffix}"), skip_bad=True))
    assert (len(read.train), read.dropped) == (2, {"invalid row": len(rows) - 2})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", json.dumps([FORMS["plain"]] * 3, indent=1), r":1: .*a list of rows is a \.json file"),
        ("pairs.jsonl", json.dumps([FORMS["plain"]] * 3), r":1: .*a list of rows is a \.json file"),
        (
            "pairs.jsonl",
            "[\n" + ",\n".join([json.dumps(FORMS["plain"])] * 3) + "\n]",
            r":1: .*a list of rows is a \.json file",
        ),
        (
            "pairs.json",
            '{"prompt": "a"}\n{"prompt": "b"}',
            r"a file with one object on each line must be named \.jsonl",
        ),
        ("pairs.json", '[{"prompt": "a"},\n {"prompt": ]', r":2: row 2: not valid JSON"),
        ("pairs.json", '[{"prompt": "a"}\n {"prompt": 1}]', r":2: not valid JSON: expected a comma"),
        ("pairs.json", '[\n{"prompt": ' + "[" * 100_000, r":2: row 1: nested too deeply"),
        ("pairs.csv", "prompt;chosen;rejected\na;b, c;d\n", r":1: fields are separated by semicolons"),
        ("pairs.csv", "prompt\tchosen\trejected\na\tb\td\n", r":1: fields are separated by tabs"),
    ],
)
@pytest.mark.parametrize("skip_bad", [True, False])
def test_wrong_file_format_is_reported_with_the_right_one(
    name: str, content: str, message: str, skip_bad: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name) + f".*{message}"):
        pairs_of(Preference(str(tmp_path / name), skip_bad=skip_bad))


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    for near in ("pair.jsonl", "pairs.json", "pairs", "pairs.jsnl", "pairs.ndjson", "PAIRS.JSONL"):
        with pytest.raises(UserError, match=r"no data file .*, did you mean 'pairs\.jsonl'\?"):
            list(sources.rows_or_raise(str(tmp_path / near)))


def test_file_of_unknown_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").touch()
    with pytest.raises(UserError, match=r"a file of unknown format; save it as one of \.jsonl, "):
        list(sources.rows_or_raise(str(tmp_path / "pairs.tsv")))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_unknown_columns_are_refused_with_the_keys_of_the_recipe(skip_bad: bool, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"question_text": "a", "good": "b", "bad": "c"}\n')
    with pytest.raises(UserError) as refused:
        pairs_of(Preference(str(file), skip_bad=skip_bad))
    assert "name your columns in `columns`" in str(refused.value)
    assert ("skip_bad = true" in str(refused.value)) is not skip_bad


def test_unknown_columns_without_a_recipe_table_are_to_be_renamed(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"question_text": "a"}\n')
    with pytest.raises(UserError, match=r"needs prompt\); rename the column in the data$"):
        list(sources.read_all(str(file), row_reader.prompt, Counter()))
    assert sources.unread_warnings({"input": 2}, sources.RENAME_IN_FILE) == [
        "column 'input' is filled in 2 rows but not read; if it is part of the prompt, rename the column in the data"
    ]


@pytest.mark.parametrize("data", ["nowhere.jsonl", "demo:nothing", "not a source", "."])
def test_missing_sources_are_refused(data: str) -> None:
    with pytest.raises(UserError):
        list(sources.rows_or_raise(data))


def test_uncached_dataset_is_reported_offline() -> None:
    with pytest.raises(UserError, match="not in the cache and could not be fetched"):
        list(sources.rows_or_raise("nobody/nothing"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rankers_order_one_file_in_four_ways(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": "x" * (i % 3 + 1), "rejected": "yy", "score_chosen": i % 2, "score_rejected": 0.5}
        for i in range(60)
    ]
    rows[7]["score_chosen"] = None
    rows[8]["score_rejected"] = float("nan")
    _write(tmp_path / f"pairs{suffix}", rows)
    by_rank = {
        rank: pairs_of(Preference(str(tmp_path / f"pairs{suffix}"), rank), 0.2)
        for rank in ("label", "shorter", "longer", "rating:score")
    }
    assert all(pair.chosen.startswith("x") for pair in by_rank["label"].train)
    assert by_rank["shorter"].dropped == by_rank["longer"].dropped == {"tie": 20}
    for short, long in zip(by_rank["shorter"].train, by_rank["longer"].train, strict=True):
        assert len(short.chosen) < len(short.rejected)
        assert (short.chosen, short.rejected) == (long.rejected, long.chosen)
    assert by_rank["rating:score"].dropped == {"no rating": 2}
    assert {pair.chosen[0] for pair in by_rank["rating:score"].train} == {"x", "y"}
    held_out = [{pair.prompt for pair in split.held_out} for split in (by_rank["label"], by_rank["rating:score"])]
    assert held_out[0] >= held_out[1] != set()
    assert not held_out[0] & {pair.prompt for pair in by_rank["label"].train}


@pytest.mark.parametrize("form", ["plain", "psychocounsel", "implicit prompt", "alpaca", "sharegpt", "pku"])
def test_system_column_is_part_of_the_prompt(form: str) -> None:
    comparison = only({**FORMS[form], "system": "Be kind."})
    assert comparison.prompt == (Message("system", "Be kind."), Message("user", "Hi?"))
    assert only({**FORMS[form], "system": ""}).prompt == (Message("user", "Hi?"),)


def test_unread_query_column_is_refused() -> None:
    row = {"query": "What is it?", "chosen": "It is Paris.", "rejected": "It is Lyon."}
    with pytest.raises(UserError, match="no prompt column; if 'query' holds the prompt, add columns"):
        only(row)
    turns = [[*ASK, {"role": "assistant", "content": answer}] for answer in (GOOD, BAD)]
    whole = {"instruction": "Hi?", "chosen": turns[0], "rejected": turns[1]}
    assert only(whole) == only(FORMS["implicit prompt"])


FORMS_WITH_INPUT = ["plain", "psychocounsel", "alpaca", "pku", "llama-factory", "llama-factory's alpaca", "pandalm"]


@pytest.mark.parametrize("form", FORMS_WITH_INPUT)
def test_input_and_history_are_part_of_the_prompt(form: str) -> None:
    comparison = only({**FORMS[form], "input": "Of this.", "history": [["Ho?", "Hum."]], "system": "Be kind."})
    turns = [("system", "Be kind."), ("user", "Ho?"), ("assistant", "Hum."), ("user", "Hi?\n\nOf this.")]
    assert [(turn.role, turn.content) for turn in comparison.prompt] == turns


@pytest.mark.parametrize(
    ("form", "column", "value"),
    [
        ("conversational", "input", "Of this."),
        ("plain", "context", "Paris is a city."),
        ("plain", "messages", [{"role": "user", "content": "Another one."}]),
        ("plain", "tools", "[]"),
        ("pku", "question", "Another one?"),
        ("sharegpt", "prompt", "Another one?"),
        ("plain", "label", "rejected"),
        ("conversational", "winner", 0),
    ],
)
def test_unread_known_columns_are_counted(form: str, column: str, value: Any, tmp_path: Path) -> None:
    rows = [{**FORMS[form], column: of} for of in (value, None, value)]
    _write(tmp_path / "pairs.jsonl", rows)
    dropped = pairs_of(Preference(str(tmp_path / "pairs.jsonl"), "shorter")).dropped
    assert sources.pop_unread(dropped) == {column: 2}
    assert not dropped


def test_unread_label_is_reported_as_a_label() -> None:
    [warning] = sources.unread_warnings({"safer_response_id": 3})
    assert warning == (
        "column 'safer_response_id' is filled in 3 rows but not read; it looks like a label, but this form does not "
        "use it; check the order of chosen and rejected"
    )


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_rejected_completion_is_no_conversation(column: str) -> None:
    row = {"prompt": "Hi?", "completion": GOOD}
    assert row_reader.conversation({**row, column: True}, "here") == row_reader.conversation(row, "here")
    with pytest.raises(UserError, match=f"here: {column} is false, so the completion is a rejected one"):
        row_reader.conversation({**row, column: False}, "here")


def test_row_with_fewer_than_two_answers_is_counted(tmp_path: Path) -> None:
    several = RATED["UltraFeedback"]
    rows = [several, *({**several, "completions": several["completions"][:number]} for number in (0, 1))]
    _write(tmp_path / "pairs.jsonl", rows)
    read = pairs_of(Preference(str(tmp_path / "pairs.jsonl"), "rating:helpfulness"))
    assert read.dropped == {"fewer than two answers": 2}
    assert len(read.train) == 1


def test_other_columns_of_a_prompt_are_named_without_a_recipe() -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    unread = Counter[str]()
    row = {"prompt": "Summarise.", "conversations": turns, "images": ["a.png"]}
    assert sources.TrackedRow(row).unread(None) == ["images", "prompt", "conversations"]
    assert {"images", "conversations"} <= sources.ASKED
    assert not unread


def test_columns_that_repeat_the_prompt_are_not_counted_as_unread(tmp_path: Path) -> None:
    whole = [*ASK, {"role": "assistant", "content": GOOD}]
    row = {**FORMS["prompt twice"], "messages": whole, "instruction": "Hi?", "question": "Hi?"}
    _write(tmp_path / "pairs.jsonl", [row])
    assert not pairs_of(Preference(str(tmp_path / "pairs.jsonl"))).dropped


def test_all_turns_of_a_completion_are_read() -> None:
    completion = [("assistant", "Well?"), ("user", "So?"), ("assistant", GOOD)]
    row = {"prompt": "Hi?", "completion": [{"role": role, "content": text} for role, text in completion]}
    turns = [(message.role, message.content) for message in row_reader.conversation(row, "here").messages]
    assert turns == [("user", "Hi?"), *completion]


@pytest.mark.parametrize(("flag", "read"), [("False", False), ("true", True), (True, True), (1, True), ("", None)])
def test_safety_flags_are_read_from_bool_int_and_text(flag: object, read: bool | None) -> None:
    comparison = only({**FORMS["pku"], "is_response_0_safe": flag, "is_response_1_safe": flag})
    assert comparison.safe == (None if read is None else (read, read))


def test_rating_that_becomes_text_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi?", "response": GOOD, "helpfulness": value, "verbosity": 1} for value in (3, 3, "three")]
    _write(tmp_path / "ratings.jsonl", rows)
    table = Ratings(str(tmp_path / "ratings.jsonl"))
    with pytest.raises(UserError, match=r"ratings\.jsonl:3: no rating 'helpfulness' \(the row has: verbosity\)"):
        list(read_ratings(table, 0.0, None, Counter()))
    _write(tmp_path / "ratings.jsonl", rows[::-1])
    with pytest.raises(UserError, match=r"ratings\.jsonl:2: a rating 'helpfulness', which the first row lacks"):
        list(read_ratings(table, 0.0, None, Counter()))


def test_source_without_any_valid_rating_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    _write(
        tmp_path / "ratings.jsonl", [{"prompt": "Hi?", "response": GOOD, "helpfulness": value} for value in (30, 40)]
    )
    table = Ratings(str(tmp_path / "ratings.jsonl"), skip_bad=True)
    with pytest.raises(
        UserError, match=r"ratings\.jsonl:1: helpfulness is 30; .* \(no other answer has a valid rating"
    ):
        list(read_ratings(table, 0.0, None, Counter()))


def test_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    _write(file, [{**FORMS["plain"], "chosen": f"{GOOD} {i * 7919 % 1000}"} for i in range(3000)])
    content = bytearray(file.read_bytes())
    content[200:400] = bytes(byte ^ 0x5A for byte in content[200:400])
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"pairs\.parquet: not a complete Parquet file") as refused:
        material_of(Preference(str(file)))
    assert refused.value.exit_code == 2


def test_csv_labels_rank_pairs(tmp_path: Path) -> None:
    _write(
        tmp_path / "pairs.csv",
        [{**FORMS["pku"], "safer_response_id": ""}, {**FORMS["pku"], "safer_response_id": "1.0"}],
    )
    read = pairs_of(Preference(str(tmp_path / "pairs.csv"), "label:safer_response_id"))
    assert [pair.chosen for pair in read.train] == [BAD]
    assert read.dropped == {"tie": 1}


def test_undecodable_files_are_refused_with_a_line(tmp_path: Path) -> None:
    for suffix, content in (
        (".jsonl", b'{"prompt": "\xff"}'),
        (".csv", b"prompt,chosen,rejected\n\xff,b,c\n"),
        (".csv", b"prompt,chosen,rejected\na,b, c, d\n"),
    ):
        file = tmp_path / f"pairs{suffix}"
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"pairs{re.escape(suffix)}:\d"):
            list(sources.rows_or_raise(str(file)))


def test_error_says_that_all_rows_are_held_out(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl", [FORMS["plain"]])
    with pytest.raises(UserError, match="held out: 1"):
        material_of(Preference(str(tmp_path / "pairs.jsonl")), 0.999999)


def test_missing_label_or_rating_lists_the_existing_ones(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl", [FORMS["pku"]])
    file = str(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="better_response_id, safer_response_id"):
        pairs_of(Preference(file, "label:kinder_response_id"))
    with pytest.raises(UserError, match=r"no rating 'helpfulness'.*none"):
        pairs_of(Preference(file, "rating:helpfulness"))


def test_limit_bounds_the_rows_and_changes_the_fingerprint() -> None:
    few, again, more = (
        material_of(Preference("demo:pairs", "label:better_response_id"), 0.05, limit) for limit in (10, 10, 11)
    )
    assert len(few.train) == 10
    assert few.facts["fingerprint"] == again.facts["fingerprint"] != more.facts["fingerprint"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASK, {"role": "assistant", "content": GOOD}]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": GOOD}]},
        {"instruction": "Hi?", "input": "", "output": GOOD},
        {"prompt": "Hi?", "completion": GOOD},
        {"prompt": ASK, "completion": [{"role": "assistant", "content": GOOD}]},
        {"messages": [*ASK, {"role": "assistant", "content": GOOD}], "system": None},
    ],
)
def test_every_conversation_form_gives_the_same_turns(row: Mapping[str, Any], tmp_path: Path) -> None:
    assert row_reader.conversation(row, "here").messages == (Message("user", "Hi?"), Message("assistant", GOOD))
    _write(tmp_path / "chats.jsonl", [row])
    table = Sft(data=str(tmp_path / "chats.jsonl"), held_out=0.0)
    assert [aside for _, aside in pairs.read_conversations(table, Counter())] == [False]


def test_missing_label_is_a_tie() -> None:
    row = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": None}
    comparison = only(row)
    assert comparison.ranked(Ranker.parse("label")) == "tie"


def test_alpaca_history_precedes_the_instruction() -> None:
    row = {"instruction": "And?", "input": "x", "output": GOOD, "system": "Be kind.", "history": [["Hi?", BAD]]}
    turns = [(message.role, message.content) for message in row_reader.conversation(row, "here").messages]
    before = [("system", "Be kind."), ("user", "Hi?"), ("assistant", BAD)]
    assert turns == [*before, ("user", "And?\n\nx"), ("assistant", GOOD)]
    with pytest.raises(UserError, match="here: "):
        row_reader.conversation({**row, "history": [["Hi?"]]}, "here")


RATED: dict[str, Mapping[str, Any]] = {
    "HelpSteer": {"prompt": "Hi?", "response": GOOD, "helpfulness": 3, "verbosity": "1", "coherence": None, "id": "x"},
    "UltraFeedback": {
        "instruction": "Hi?",
        "completions": [
            {
                "response": GOOD,
                "annotations": {
                    "helpfulness": {"Rating": "3"},
                    "verbosity": {"Rating": 1},
                    "coherence": {"Rating": "N/A"},
                },
            },
            {"response": BAD, "annotations": {"helpfulness": {"Rating": "0"}}, "overall_score": 2.5},
        ],
    },
    "pairs": {
        "prompt": "Hi?",
        "response_0": GOOD,
        "response_1": BAD,
        "helpfulness_0": 3,
        "helpfulness_1": 0,
        "verbosity_0": 1,
        "verbosity_1": 4,
        "coherence_0": None,
        "coherence_1": 2,
    },
    "chosen and rejected": {
        "prompt": "Hi?",
        "chosen": GOOD,
        "rejected": BAD,
        "helpfulness_chosen": 3,
        "helpfulness_rejected": 0,
        "verbosity_chosen": 1,
        "verbosity_rejected": 4,
        "coherence_chosen": None,
        "coherence_rejected": 2,
    },
}


@pytest.mark.parametrize("form", RATED)
def test_every_rated_form_gives_the_same_ratings(form: str) -> None:
    first, *others = row_reader.rated(RATED[form], "here")
    assert first.prompt == (Message("user", "Hi?"),)
    assert first.answer == GOOD
    assert {name: first.ratings[name] for name in ("helpfulness", "verbosity")} == {"helpfulness": 3, "verbosity": 1}
    assert math.isnan(first.ratings["coherence"])
    assert "id" not in first.ratings
    for other in others:
        assert (other.answer, other.ratings["helpfulness"]) == (BAD, 0)


def test_demo_ratings_are_read() -> None:
    rows = [row for where, raw in sources.rows_or_raise("demo:ratings?rows=50") for row in row_reader.rated(raw, where)]
    assert len(rows) == 50
    assert all(isinstance(row, Rated) and 0 <= row.ratings["politeness"] <= 4 for row in rows)


def test_hh_transcripts_with_several_turns() -> None:
    before = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And now?\nStill here?"
    comparison = only({"chosen": f"{before}\n\nAssistant: {GOOD}", "rejected": f"{before}\n\nAssistant: {BAD}"})
    assert [(turn.role, turn.content) for turn in comparison.prompt] == [
        ("user", "Hi?"),
        ("assistant", "Hello."),
        ("user", "And now?\nStill here?"),
    ]
    assert comparison.answers == (GOOD, BAD)
    with pytest.raises(UserError, match="do not share their prompt"):
        only({"chosen": f"{before}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: Ho?\n\nAssistant: {BAD}"})
    with pytest.raises(UserError, match="the last turn is the user's"):
        only({"chosen": before, "rejected": before})


@pytest.mark.parametrize(("strength", "won"), [(-3, GOOD), (-1, GOOD), (0, "tie"), (2, BAD)])
def test_helpsteer_strength_is_a_label_and_a_rating(strength: int, won: str) -> None:
    comparison = only({**FORMS["helpsteer3"], "overall_preference": strength})
    ranked = comparison.ranked(Ranker.parse("label"))
    assert (ranked if isinstance(ranked, str) else ranked.chosen) == won
    close = comparison.ranked(Ranker.parse("rating:overall_preference"), margin=2)
    assert isinstance(close, str) == (abs(strength) < 2)


def test_several_answers_give_all_pairs(tmp_path: Path) -> None:
    completions = [
        {"response": str(n), "annotations": {"honesty": {"Rating": str(n)}}, "overall_score": 5.0} for n in range(4)
    ]
    _write(tmp_path / "four.jsonl", [{"instruction": "Hi?", "completions": completions}])
    read = pairs_of(Preference(str(tmp_path / "four.jsonl"), "rating:honesty"))
    assert len(read.train) == 6
    assert all(int(pair.chosen) > int(pair.rejected) for pair in read.train)
    tied = Preference(str(tmp_path / "four.jsonl"), "rating:overall")
    with pytest.raises(UserError, match="6 × tie"):
        material_of(tied)


def test_columns_renames_columns(tmp_path: Path) -> None:
    _write(tmp_path / "own.jsonl", [{"ask": "Hi?", "better": GOOD, "worse": BAD, "chosen": "of something else"}])
    columns = {"prompt": "ask", "chosen": "better", "rejected": "worse"}
    [pair] = pairs_of(Preference(str(tmp_path / "own.jsonl"), columns=columns)).train
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("Hi?", GOOD, BAD)
    with pytest.raises(UserError, match=r"own\.jsonl:1: no column 'best' \(the row has: ask, better"):
        pairs_of(Preference(str(tmp_path / "own.jsonl"), columns={"chosen": "best"}))


def test_columns_reads_a_value_inside_a_column(tmp_path: Path) -> None:
    rows = [{**FORMS["plain"], "scores": {"chosen": 2 - i, "rejected": 1}, "a.b": "x"} for i in range(3)]
    _write(tmp_path / "own.jsonl", rows)
    columns = {"score_chosen": "scores.chosen", "score_rejected": "scores.rejected"}
    ranked = Preference(str(tmp_path / "own.jsonl"), columns=columns, rank="rating:score", margin=0.5)
    assert [pair.chosen for pair in pairs_of(ranked).train] == [FORMS["plain"]["chosen"], FORMS["plain"]["rejected"]]
    with pytest.raises(UserError, match=r"own\.jsonl:1: no column 'scores\.best' \(the row has: "):
        pairs_of(Preference(str(tmp_path / "own.jsonl"), columns={"score_chosen": "scores.best"}))


def test_skip_bad_counts_bad_rows(tmp_path: Path) -> None:
    good = json.dumps(FORMS["plain"])
    (tmp_path / "pairs.jsonl").write_text(f'{good}\n{{"prompt": \n[1]\n{{"prompt": 3}}\n{good}\n')
    with pytest.raises(UserError, match=":2: not valid JSON"):
        pairs_of(Preference(str(tmp_path / "pairs.jsonl")))
    read = pairs_of(Preference(str(tmp_path / "pairs.jsonl"), skip_bad=True))
    assert len(read.train) == 2
    assert read.dropped == {"invalid row": 3}


def test_missing_or_off_scale_rating_makes_a_row_invalid(tmp_path: Path) -> None:
    rated = [{"score_chosen": 2, "score_rejected": 1}, {}, {"score_chosen": 3, "score_rejected": 1}]
    _write(tmp_path / "pairs.jsonl", [{**FORMS["plain"], **scores} for scores in rated])
    read = pairs_of(Preference(str(tmp_path / "pairs.jsonl"), "rating:score", skip_bad=True))
    assert (len(read.train), read.dropped) == (2, {"invalid row": 1})

    answers = [{"prompt": "Hi?", "response": GOOD, **scores} for scores in ({"help": 3}, {"help": 9}, {"other": 1})]
    _write(tmp_path / "ratings.jsonl", answers)
    table = Ratings(str(tmp_path / "ratings.jsonl"), attributes=("help",))
    with pytest.raises(UserError, match=r"ratings\.jsonl:2: help is 9; the recipe's scale is 0 to 4"):
        list(read_ratings(table, 0.0, None, Counter()))
    dropped: Counter[str] = Counter()
    [(row, _)] = read_ratings(replace(table, skip_bad=True), 0.0, None, dropped)
    assert row.ratings == {"help": 75.0}
    assert dropped == {"invalid row": 2}


@pytest.mark.parametrize("row", [{"instruction": "a", "input": "\ud800"}, {"prompt": "a", "completion": "\ud800"}])
def test_unpaired_surrogates_are_refused(row: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"here: .*surrogate"):
        row_reader.conversation({"output": "b", **row}, "here")


def test_many_rows_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """One row has ten megabytes."""
    file = tmp_path / "pairs.jsonl"
    row = json.dumps(FORMS["plain"]) + "\n"
    with file.open("w") as stream:
        for _ in range(10):
            stream.write(row * 8_000)
        stream.write(json.dumps({**FORMS["plain"], "chosen": "x" * 10_000_000}) + "\n")
    tracemalloc.start()
    count = sum(len(row_reader.comparisons(parsed, where)) for where, parsed in sources.rows_or_raise(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 80_001
    assert peak < 60e6


def test_column_of_a_json_fault_and_name_of_a_file_are_right(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not valid JSON: .* at column 30"):
        list(sources.rows_or_raise(str(file)))
    assert sources.name(Source(str(file), subset="harmless-base")) == str(file)
    assert sources.name(Source("Anthropic/hh-rlhf", subset="harmless-base")) == "Anthropic/hh-rlhf harmless-base"

"""Label columns are read with the right meaning, or refused with the values they hold: never inverted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_align import recipe
from lora_align.errors import UserError
from lora_align.rankers import Winner
from lora_align.recipe import Preference
from support import pairs_of

Rows = Sequence[Mapping[str, Any]]
FIRST, SECOND = "The first answer.", "The second one."
LLMBAR = {"input": "Hi?", "output_1": FIRST, "output_2": SECOND}
PANDALM = {"instruction": "Add.", "input": "1 and 2", "response1": FIRST, "response2": SECOND}
PKU = {"prompt": "Hi?", "response_0": FIRST, "response_1": SECOND}
A_OR_B = {"A": Winner.first, "B": Winner.second, "C": Winner.tie}


def written(folder: Path, rows: Rows) -> str:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chosen(preference: Preference) -> list[str]:
    return [pair.chosen for pair in pairs_of(preference).train]


@pytest.mark.parametrize("skip_bad", [True, False])
@pytest.mark.parametrize("form", [LLMBAR, PANDALM])
def test_labels_1_and_2_mean_answers_1_and_2(form: Mapping[str, Any], skip_bad: bool, tmp_path: Path) -> None:
    file = written(tmp_path, [{**form, "label": label} for label in (1, 2, 0, 1)])
    read = pairs_of(Preference(file, skip_bad=skip_bad))
    assert [pair.chosen for pair in read.train] == [FIRST, SECOND, FIRST]
    assert read.dropped == {"tie": 1}
    prompt = "Hi?" if form is LLMBAR else "Add.\n\n1 and 2"
    assert {pair.prompt[0].content for pair in read.train} == {prompt}


@pytest.mark.parametrize("skip_bad", [True, False])
def test_renamed_answer_columns_keep_their_original_numbers(skip_bad: bool, tmp_path: Path) -> None:
    file = written(tmp_path, [{**LLMBAR, "label": 1}] * 3)
    columns = {"prompt": "input", "response_0": "output_1", "response_1": "output_2"}
    assert chosen(Preference(file, columns=columns, skip_bad=skip_bad)) == [FIRST] * 3
    swapped = {"prompt": "input", "response_0": "output_2", "response_1": "output_1"}
    with pytest.raises(
        UserError, match=r"label is 1; its meaning is unknown\. .*; set which answer each value prefers"
    ):
        chosen(Preference(file, columns=swapped, skip_bad=skip_bad))


@pytest.mark.parametrize("labels", [(1, 2), (0, 1, 0, 2), (0, "A"), ("model_a", "model_b"), (0, 1, 0.5), (0, -1)])
def test_unexpected_labels_are_refused_under_skip_bad(labels: Sequence[object], tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "label": label} for label in labels])
    with pytest.raises(UserError, match=r"pairs\.jsonl:\d: label is .* expected 0, 1, or nothing for a tie") as refused:
        chosen(Preference(file, skip_bad=True))
    assert all(f"{label} (" in str(refused.value) for label in labels)
    assert "labels = {" in str(refused.value)


def test_label_behind_the_limit_is_checked(tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "label": i % 2} for i in range(50)] + [{**PKU, "label": 2}])
    with pytest.raises(UserError, match=r":51: label is 2; .*0 \(25\), 1 \(25\), 2 \(1\)") as refused:
        pairs_of(Preference(file), limit=5)
    assert 'labels = { 1 = "first", 2 = "second", 0 = "tie" }' in str(refused.value)


def test_labels_0_and_1_of_answers_1_and_2_are_ambiguous(tmp_path: Path) -> None:
    file = written(tmp_path, [{**LLMBAR, "label": label} for label in (0, 1)])
    with pytest.raises(UserError, match="label is 0; no label is 2, so 0 may mean output_1 or a tie") as refused:
        chosen(Preference(file, skip_bad=True))
    assert '0 = "first, second or tie"' in str(refused.value)
    assert chosen(Preference(file, labels={"0": Winner.first, "1": Winner.second})) == [FIRST, SECOND]


def test_labels_of_answers_without_numbers_need_a_table(tmp_path: Path) -> None:
    shp = {"history": "Hi?", "human_ref_A": FIRST, "human_ref_B": SECOND}
    file = written(tmp_path, [{**shp, "labels": 1}, {**shp, "labels": 0}])
    columns = {"prompt": "history", "response_0": "human_ref_A", "response_1": "human_ref_B", "label": "labels"}
    with pytest.raises(UserError, match="label is 1; its meaning is unknown") as refused:
        chosen(Preference(file, columns=columns))
    assert str(refused.value).endswith('labels = { 0 = "first, second or tie", 1 = "first, second or tie" }')
    labels = {"1": Winner.first, "0": Winner.second}
    assert chosen(Preference(file, columns=columns, labels=labels)) == [FIRST, SECOND]


def test_rows_of_two_label_forms_in_one_file_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "label": 0}, {**LLMBAR, "label": 2}])
    with pytest.raises(UserError, match=r":2: the answers are in output_1 and output_2, in earlier rows in response_0"):
        chosen(Preference(file))


def test_labels_behind_many_rows_without_any_are_checked(tmp_path: Path) -> None:
    plain = {"prompt": "Hi?", "chosen": FIRST, "rejected": SECOND}
    file = written(tmp_path, [plain] * 1100 + [{**LLMBAR, "label": label} for label in (0, 1)])
    with pytest.raises(UserError, match="label is 0; no label is 2"):
        chosen(Preference(file))


HELPSTEER2 = {"prompt": "Hi?", "response_1": FIRST, "response_2": SECOND}
HELPSTEER3 = {"context": "Hi?", "response1": FIRST, "response2": SECOND}
STRENGTHS = [(HELPSTEER2, "preference_strength"), (HELPSTEER3, "overall_preference")]


@pytest.mark.parametrize(("form", "name"), STRENGTHS)
@pytest.mark.parametrize("rank", ["label", "rating:{}"])
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1, 2, 3, 4, 5, 6, 7], "is 4; expected a strength from -3 (first) to 3 (second)"),
        ([1, 2], "is 1; no strength is negative, so the values may be labels"),
        ([0, 1, 2, None], "is 1; no strength is negative, so the values may be labels"),
        ([-1, "A"], "is A; expected a strength"),
    ],
)
def test_strengths_outside_their_scale_are_refused(
    form: Rows, name: str, rank: str, values: Sequence[object], why: str, tmp_path: Path
) -> None:
    rows = [{**form, name: value} for value in values]
    other = {"prompt": "Hi?", "chosen": FIRST, "rejected": SECOND}  # the last row has another form
    file = written(tmp_path, [*rows, other])
    with pytest.raises(UserError) as refused:
        chosen(Preference(file, rank.format(name), skip_bad=True))
    assert f"{name} {why}" in str(refused.value)
    assert f'rank = "label:{name}"' in str(refused.value)


@pytest.mark.parametrize(("form", "name"), STRENGTHS)
def test_labels_table_sets_the_meaning_of_strengths(form: Rows, name: str, tmp_path: Path) -> None:
    file = written(tmp_path, [{**form, name: value} for value in (1, 2)])
    assert chosen(Preference(file, labels={"1": Winner.first, "2": Winner.second})) == [FIRST, SECOND]


def test_strength_beside_a_label_requires_a_choice(tmp_path: Path) -> None:
    rows = [{**HELPSTEER2, "preference_strength": value, "label": 1} for value in (1, -1)]
    file = written(tmp_path, rows)
    with pytest.raises(UserError, match=r"several label columns \(preference_strength, label\)"):
        chosen(Preference(file))
    assert chosen(Preference(file, "label:label")) == [FIRST, FIRST]
    assert chosen(Preference(file, "label:preference_strength")) == [SECOND, FIRST]


def test_lists_of_annotators_are_no_labels(tmp_path: Path) -> None:
    """HelpSteer 3 has a list of single preferences beside the overall one."""
    rows = [{**HELPSTEER3, "overall_preference": value, "individual_preference": [{"score": 1}]} for value in (1, -1)]
    assert chosen(Preference(written(tmp_path, rows))) == [SECOND, FIRST]


@pytest.mark.parametrize(
    ("values", "proposed"),
    [
        ([2, 2], '1 = "first", 2 = "second"'),
        (["B"], 'A = "first", B = "second"'),
        (["loss", "win"], 'loss = "first, second or tie", win = "first, second or tie"'),
    ],
)
def test_proposed_labels_do_not_invert(values: Sequence[object], proposed: str, tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "label": value} for value in values])
    with pytest.raises(UserError) as refused:
        chosen(Preference(file))
    assert str(refused.value).endswith(f"labels = {{ {proposed} }}")


def test_rank_can_name_a_column_called_preference(tmp_path: Path) -> None:
    file = written(tmp_path, [{**LLMBAR, "preference": 1.0}, {**LLMBAR, "preference": 2.0}])
    assert chosen(Preference(file, "label:preference")) == [FIRST, SECOND]


def test_labels_table_sets_the_meaning_of_values(tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "winner": label} for label in ("B", "C", "A", None)])
    read = pairs_of(Preference(file, labels=A_OR_B))
    assert [pair.chosen for pair in read.train] == [SECOND, FIRST]
    assert read.dropped == {"tie": 2}
    with pytest.raises(UserError, match="winner is C; expected A, B, or nothing"):
        chosen(Preference(file, labels={"A": Winner.first, "B": Winner.second}, skip_bad=True))
    one_or_two = {"1": Winner.first, "2": Winner.second}
    assert chosen(Preference(written(tmp_path, [{**PKU, "label": 1}, {**PKU, "label": 2.0}]), labels=one_or_two)) == [
        FIRST,
        SECOND,
    ]


def test_labels_table_is_refused_for_rows_without_labels(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "Hi?", "chosen": FIRST, "rejected": SECOND}])
    with pytest.raises(UserError, match="`labels` is set, but the rows have no label column"):
        chosen(Preference(file, labels=A_OR_B))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{data="x.jsonl", labels={A="first"}}', 'labels: give a value for "first" and one for "second"'),
        ('{data="x.jsonl", labels={A="first", B="worse"}}', "labels.B: input should be 'first', 'second' or 'tie'"),
        ('{data="x.jsonl", rank="shorter", labels={A="first", B="second"}}', 'labels: only rank = "label" reads them'),
    ],
)
def test_recipe_rejects_a_bad_labels_table(table: str, message: str) -> None:
    with pytest.raises(UserError, match=r"preferences\.own") as refused:
        recipe.load(recipe.builtin()["demo"], [f"preferences.own={table}"])
    assert message in str(refused.value)
    good = 'preferences.own={data="x.jsonl", labels={1="first", "model b"="second"}}'
    read = recipe.load(recipe.builtin()["demo"], [good])
    assert read.preference("own").labels == {"1": Winner.first, "model b": Winner.second}
    assert recipe.from_dict(json.loads(json.dumps(read.as_dict())), "") == read


@pytest.mark.parametrize("together", [True, False])
def test_several_label_columns_require_a_choice(together: bool, tmp_path: Path) -> None:
    labels = {"better_response_id": 0, "safer_response_id": 1}
    rows = [labels] * 2 if together else [{name: label} for name, label in labels.items()]
    file = written(tmp_path, [{**PKU, **row} for row in rows])
    with pytest.raises(UserError, match=r"several label columns \(better_response_id, safer_response_id\)"):
        chosen(Preference(file, skip_bad=True))
    assert set(chosen(Preference(file, "label:safer_response_id", skip_bad=True))) == {SECOND}
    columns = {"label": "better_response_id"}
    assert set(chosen(Preference(file, columns=columns, skip_bad=True))) == {FIRST}


def test_label_column_that_does_not_rank_is_not_checked(tmp_path: Path) -> None:
    file = written(tmp_path, [{**PKU, "better_response_id": 0, "annotator1": "unsure"}])
    assert chosen(Preference(file, "label:better_response_id")) == [FIRST]
    assert chosen(Preference(file, "shorter")) == [SECOND]

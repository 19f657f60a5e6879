"""`data` on the command line: it counts the pairs that `dpo` trains on, and its figures equal naive counts."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from lora_align import recipe
from lora_align.console import Screen
from lora_align.data import pairs, row_reader, sources
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.train import dpo
from support import Cli

ROWS = "demo:pairs?rows=200"


def test_audit_of_the_demo_pairs_equals_training_and_naive_counts(cli: Cli, tmp_path: Path) -> None:
    words = ["data", "--pref", "helpful", "--set", f'preferences.helpful.data="{ROWS}"', "--picture", "lengths.png"]
    words += ["--set", f'preferences.harmless.data="{ROWS}"', "--set", "dpo.limit=1000"]
    done = cli(*words, "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    project = recipe.load(recipe.builtin()["demo"], [word for word in words if "=" in word and "--" not in word])
    axis, other = project.preference("helpful"), project.preference("harmless")
    base = bases.find(project.base)
    material = dpo.prepare(project, "helpful", base, Screen(quiet=True))
    assert printed["read"] == 200
    assert printed["usable"] == len(material.train) + len(material.held_out) == sum(n for *_, n in printed["histogram"])
    assert printed["held_out"] == len(material.held_out)
    assert printed["dropped"] == material.facts["dropped"]
    longest = max(len(pair.rejected) for pair in (*material.train, *material.held_out))
    assert printed["tokens"]["rejected"][-1] == longest
    assert printed["shown"][0]["chosen"] == _marked(base, material.train[0].chosen)

    longer = unlike = same = both = 0
    for where, row in sources.rows_or_raise(ROWS):
        [comparison] = row_reader.comparisons(row, where)
        pair = pairs.rank_comparison(comparison, axis, where)
        theirs = pairs.rank_comparison(comparison, other, where)
        if not isinstance(pair, str):
            unlike += len(pair.chosen) != len(pair.rejected)
            longer += len(pair.chosen) > len(pair.rejected)
            if not isinstance(theirs, str):
                both += 1
                same += theirs.chosen == pair.chosen
    assert printed["longer_wins"] == longer / unlike
    assert printed["agreement"]["harmless"] == same / both
    assert imread(tmp_path / "lengths.png").std() > 0

    text = cli(*words).out
    assert "⟦" in text
    assert "the longer answer wins" in text
    assert max(map(len, text.split("\n\n", 2)[2].splitlines())) <= 100


def test_opposite_preferences_and_nearly_equal_prompts_are_reported(cli: Cli, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What is {i // 2}{'?' if i % 2 else ' ?!'}", "chosen": "no" + " no" * i, "rejected": "yes"}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = [f'preferences.{name}={{data="pairs.jsonl", rank="{name}er"}}' for name in ("short", "long")]
    words = ["data", "--pref", "short", *(word for table in tables for word in ("--set", table))]
    done = cli(*words, "--set", "dpo.held_out=0.5")
    assert done.code == 0, done.err
    assert "long prefers the same answer in 0% of pairs" in done.out
    held_out = [pairs.is_held_out((Message("user", str(row["prompt"])),), 0.5) for row in rows]
    split = sum(held_out[i] != held_out[i + 1] for i in range(0, 60, 2))
    assert split > 5
    assert f"{split} prompts equal to a held-out prompt except for case, spaces or punctuation" in done.err


def test_repeated_and_contradicted_pairs_are_warned_of(cli: Cli, tmp_path: Path) -> None:
    one = {"prompt": "Hi?", "chosen": "A long answer.", "rejected": "No."}
    rows = [one] * 4 + [{**one, "chosen": one["rejected"], "rejected": one["chosen"]}] * 2
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "--pref", "own", "--set", 'preferences.own.data="pairs.jsonl"']
    done = cli(*words)
    assert done.code == 0, done.err
    assert "4 pairs repeated word for word" in done.err
    assert "2 pairs contradicted (same answers, opposite label); correct the labels" in done.err
    assert "no pair is held out, so nothing will be measured" in done.err
    assert "the longer answer wins 67% of pairs of unequal length (33% in `neg`)" in done.out
    by_length = cli(*words, "--set", "preferences.own.rank=shorter")
    assert "the longer answer wins 0% of pairs of unequal length (100% in `neg`)" in by_length.out
    assert "which the adapter learns" not in by_length.err, "the ranker asks for length"


def test_limit_and_held_out_count_as_in_training(cli: Cli) -> None:
    words = ["data", "--pref", "helpful", "--set", "dpo.limit=100", "--set", "dpo.held_out=0.3", "--json"]
    printed = json.loads(cli(*words).out)
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=100", "dpo.held_out=0.3"])
    facts = dpo.prepare(project, "helpful", bases.find(project.base), Screen(quiet=True)).facts
    assert printed["usable"] - printed["held_out"] == facts["rows"] == 100
    assert printed["held_out"] == facts["held_out"] > 0
    assert printed["dropped"] == facts["dropped"]


def _marked(base: bases.Base, ids: list[int]) -> str:
    return f"⟦{base.chat.tokenizer.decode(ids)}⟧"


def test_drops_length_bias_unsafe_pairs_and_truncation_are_reported(cli: Cli, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Question {i}?",
            "response_0": "Long " * (40 if i == 0 else 8),
            "response_1": "Short.",
            "better_response_id": 0,
            "is_response_0_safe": False,
            "is_response_1_safe": i % 4 == 0,
        }
        for i in range(20)
    ]
    rows.append({**rows[0], "better_response_id": None})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    words = ["data", "--pref", "helpful", "--set", 'preferences.helpful.data="pairs.jsonl"']
    words += ["--set", 'preferences.helpful.rank="label"', "--set", "preferences.helpful.margin=0"]
    words += ["--set", "dpo.max_length=60"]
    refused = cli(*words)
    assert refused.code == 2
    assert "pairs.jsonl:22: not valid JSON" in refused.err
    done = cli(*words, "--set", "preferences.helpful.skip_bad=true")
    assert done.code == 0, done.err
    assert "22 rows, 20 pairs of 20 prompts" in done.out
    assert "dropped: 1 × tie, 1 × invalid row" in done.out
    assert "the longer answer wins 100% of pairs of unequal length, which the adapter learns" in done.err
    assert "both answers are unsafe: 15 pairs" in done.out
    assert "1 answer truncated" in done.err


def test_another_preference_that_cannot_rank_the_rows_is_not_compared(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}?", "chosen": "Yes it is.", "rejected": "No."} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = ['preferences.own={data="pairs.jsonl"}', 'preferences.kind={data="pairs.jsonl", rank="rating:kindness"}']
    words = [word for table in tables for word in ("--set", table)]
    done = cli("data", "--pref", "own", *words)
    assert done.code == 0, done.err
    assert "kind is not compared: pairs.jsonl:1: no rating 'kindness'" in done.out
    assert cli("data", "--pref", "kind", *words).code == 2


def test_preference_with_other_columns_is_not_compared(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}?", "a": "Yes it is.", "b": "No."} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = (("one", "a", "b"), ("two", "b", "a"))
    tables = [
        f'preferences.{name}={{data="pairs.jsonl", columns={{chosen="{chosen}", rejected="{rejected}"}}}}'
        for name, chosen, rejected in columns
    ]
    done = cli("data", "--pref", "one", *(word for table in tables for word in ("--set", table)))
    assert done.code == 0, done.err
    assert "two is not compared: it reads other columns" in done.out
    assert "two prefers" not in done.out


def test_row_of_megabytes_is_truncated_before_it_is_tokenised(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}?", "chosen": "Yes it is. " * (1 if i else 10**6), "rejected": "No."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "--pref", "own", "--set", 'preferences.own.data="pairs.jsonl"', "--json"]
    done = cli(*words)
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["answers_truncated"] == 1
    assert 512 < printed["tokens"]["chosen"][-1] < 50_000, "the text has 3,000,000 tokens"


def test_unsafe_pairs_are_counted_without_ties(cli: Cli, tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "response_0": "b",
        "response_1": "c",
        "is_response_0_safe": False,
        "is_response_1_safe": False,
    }
    rows = [{**row, "prompt": str(i), "better_response_id": None if i < 3 else 0} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("data", "--pref", "own", "--set", 'preferences.own={data="pairs.jsonl"}', "--json")
    assert json.loads(done.out)["both_unsafe"] == 5


ALIKE = {"prompt": "a", "chosen": "b", "rejected": "b"}
GOOD = {"prompt": "a", "chosen": "Yes it is.", "rejected": "No."}
BLIND = "base.chat_template='{% for message in messages %}<|user|>Hm?<|end|>{% endfor %}'"


@pytest.mark.parametrize(
    ("rows", "setting", "why"),
    [
        ([ALIKE] * 3, "", "3 × equal answers"),
        ([{**GOOD, "chosen": " "}] * 3, "", "3 × empty answer"),
        ([GOOD] * 3, BLIND, "3 × equal in the chat template"),
        ([{**GOOD, "prompt": "a b c d e f g h"}] * 3, "dpo.max_length=8", "3 × prompt too long"),
        ([GOOD] * 3, "dpo.held_out=0.999999", "held out: 3"),
        ([{**GOOD, "chosen": None}, GOOD], "", "chosen is null"),
        ([{"prompt": "a", "response_0": "b", "response_1": "c", "label": label} for label in (1, 2)], "", "label is 2"),
        ([], "", "the source is empty"),
    ],
)
def test_data_refuses_what_dpo_refuses(
    rows: list[dict[str, object]], setting: str, why: str, cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"preferences.own={{data='{file}'}}", *filter(None, [setting])]
    project = recipe.load(recipe.builtin()["demo"], settings)
    with pytest.raises(UserError) as refused:
        dpo.prepare(project, "own", bases.find(project.base), Screen(quiet=True))
    assert why in str(refused.value)
    done = cli("data", "--pref", "own", *(word for setting in settings for word in ("--set", setting)))
    assert done.code == 2
    assert str(refused.value) in done.err
    dropped = why.removeprefix("3 × ") in (
        "equal answers",
        "empty answer",
        "equal in the chat template",
        "prompt too long",
    )
    assert (f"dropped: {why}" in done.out) == dropped, "counts are printed before the refusal"


def test_too_few_pairs_and_unread_columns_are_doubts(cli: Cli, tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": [{"role": "user", "content": f"q{i}?"}], "input": "Of this."} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("data", "--pref", "own", "--set", 'preferences.own={data="pairs.jsonl"}')
    assert done.code == 0, done.err
    assert "2 held-out pairs: too few to judge a run" in done.err
    assert "1 optimizer step (8 pairs): too few to learn much; use more pairs, a smaller batch_size" in done.err
    assert "column 'input' is filled in 10 rows but not read" in done.err

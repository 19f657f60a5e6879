"""`pairs` samples answers under two descriptions; `dpo` trains on them without the descriptions."""

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

import lora_align as la
from lora_align import recipe
from lora_align.commands.make_pairs import read_tasks
from lora_align.commands.pair_filters import Task, pair_up, whole_sentences
from lora_align.data.rows import Message
from lora_align.model.sampler_protocol import SampledText
from lora_align.recipe import Preference
from support import COMMAND, Cli

RECIPE = """
[base]
model = "demo"
[lora]
rank = 4
[preferences.long]
more = "Say a lot."
less = "Say little."
prompts = "demo:prompts?rows=400"
limit = 40
judge = "text:words"
[preferences.plain]
data = "demo:pairs?rows=100"
rank = "shorter"
[pairs]
max_new_tokens = 80
[dpo]
learning_rate = 1e-3
limit = 32
max_length = 128
held_out = 0.3
[eval]
count = 8
samples = 1
pairs = 8
max_new_tokens = 20
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "lora-align.toml").write_text(RECIPE)
    return tmp_path


def rows(folder: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in (folder / "runs/pairs/long/pairs.jsonl").read_text().splitlines()]


def test_dpo_makes_the_pairs_and_trains_on_them(project: Path, cli: Cli) -> None:
    early = cli("data", "--pref", "long")
    assert early.code == 2
    assert "no pairs were made from this description; `lora-align pairs --pref long` makes them" in early.err
    done = cli("dpo", "--pref", "long")
    assert done.code == 0, done.err
    made = rows(project)
    assert len(made) >= 8
    for row in made:
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert len(chosen.split()) > len(rejected.split())  # the judge
    for command in (["data", "--pref", "long"], ["eval", "long=1", "--by", "text:words"], ["list"]):
        used = cli(*command)
        assert used.code == 0, used.err
    trained = json.loads((project / "runs/dpo/long/pos/manifest.json").read_text())
    assert trained["recipe"]["preferences"]["long"]["data"] == ""  # its place is found anew by every command
    assert trained["recipe"]["preferences"]["long"]["more"] == "Say a lot."


def test_eval_without_the_pairs_leaves_them_out(project: Path, cli: Cli) -> None:
    done = cli("eval", "start")
    assert done.code == 0, done.err
    assert "long: pairs are left out: preferences.long: no pairs were made from this description" in done.err


def test_changed_description_is_refused_until_force(project: Path, cli: Cli) -> None:
    first = cli("pairs", "--pref", "long", "--json")
    assert first.code == 0, first.err
    again = cli("pairs", "--pref", "long")
    assert again.code == 2
    assert "runs/pairs/long exists" in again.err
    words = ("dpo", "--pref", "long", "--set", 'preferences.long.more="Say it all."')
    changed = cli(*words)
    assert changed.code == 2
    assert "runs/pairs/long was made with other settings (preference.more)" in changed.err
    assert "`lora-align pairs --pref long --force` makes new pairs" in changed.err
    forced = cli("pairs", "--pref", "long", "--force", *words[3:])
    assert forced.code == 0, forced.err
    assert list((project / "runs/pairs").glob("long.old-*"))


def test_killed_pairs_are_continued(project: Path, cli: Cli) -> None:
    words = ["pairs", "--pref", "long", "--set", "preferences.long.limit=150"]
    child = subprocess.Popen([str(COMMAND), *words, "--quiet"], cwd=project)
    parts, until = project / "runs/pairs/.long.parts", time.monotonic() + 120
    while not list(parts.glob("part-*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert list(parts.glob("part-*.parquet"))
    other = cli(*words, "--set", "pairs.seed=1")
    assert other.code == 2
    assert ".long.parts was begun with other settings (pairs); --force starts again" in other.err
    done = cli(*words)
    assert done.code == 0, done.err
    assert "pairs of long: done before: 128 of 150" in done.err
    assert not parts.exists()
    resumed = rows(project)
    assert cli(*words, "--force").code == 0
    assert rows(project) == resumed


@pytest.mark.parametrize(
    ("settings", "reason", "remedy"),
    [
        (
            ['preferences.long.judge=""', "pairs.temperature=1e-4", 'preferences.long.less="Say a lot."'],
            "× equal answers",
            "write descriptions that differ more",
        ),
        (["pairs.max_new_tokens=2"], "× unfinished answer", "raise pairs.max_new_tokens"),
    ],
)
def test_too_few_pairs_are_an_error_with_the_main_reason(
    project: Path, cli: Cli, settings: list[str], reason: str, remedy: str
) -> None:
    done = cli("pairs", "--pref", "long", *(word for setting in settings for word in ("--set", setting)))
    assert done.code == 1
    assert "from 40 prompts (dropped" in done.err
    assert reason in done.err
    assert remedy in done.err
    assert not (project / "runs/pairs/long").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['preferences.long.data="a.jsonl"'], "preferences.long: `data` and `more` exclude each other"),
        (['preferences.plain.less="x"'], "preferences.plain.less: only a preference with `more` reads this key"),
        (['preferences.long.prompts="empty.txt"'], "empty.txt: no prompts; check the file"),
        (['preferences.long.judge="text:wordz"'], "no text measure 'wordz', did you mean 'words'?"),
        (['preferences.long.judge="nobody:x"'], "no reward model 'nobody'"),
        (['preferences.long.judge="http://127.0.0.1:9"'], "no server at http://127.0.0.1:9"),
    ],
)
def test_pairs_refuses(project: Path, cli: Cli, settings: list[str], message: str) -> None:
    (project / "empty.txt").touch()
    done = cli("pairs", "--pref", "long", *(word for setting in settings for word in ("--set", setting)))
    assert done.code == 2, done.err
    assert message in done.err


def test_preference_with_data_has_no_description(project: Path, cli: Cli) -> None:
    done = cli("pairs", "--pref", "plain")
    assert done.code == 2
    assert "preferences.plain has no description; add `more` and `less`" in done.err


def test_base_as_a_judge_is_asked_in_both_orders(project: Path, cli: Cli) -> None:
    """The demo base cannot answer the question, so no pair is left."""
    done = cli("pairs", "--pref", "long", "--set", 'preferences.long.judge="base"')
    assert done.code == 1
    assert "× the judge disagrees" in done.err
    assert "write clearer descriptions, or choose another judge" in done.err


def test_descriptions_without_effect_cause_a_warning(project: Path, cli: Cli) -> None:
    done = cli("pairs", "--pref", "long", "--json", "--set", 'preferences.long.less="Say a lot. "')
    assert done.code == 0, done.err
    effect = json.loads(done.out)["metrics"]["effect"]
    assert effect["low"] <= 0 <= effect["high"]
    assert "the descriptions hardly change the answers" in done.err
    assert "the chosen answers are longer" in done.err


def test_python_trains_a_described_preference(project: Path) -> None:
    vector = la.Project(project / "lora-align.toml", project / "runs", quiet=True).train("long", limit=16)
    assert vector.norm > 0
    assert len(rows(project)) >= 8


def test_several_descriptions_are_spread_over_the_prompts() -> None:
    tasks = read_tasks(Preference(more=("a", "b"), prompts="demo:prompts?rows=40", limit=5))
    assert [task.system["more"] for task in tasks] == ["a", "b", "a", "b", "a"]
    assert {task.system["less"] for task in tasks} == {""}
    assert [turn.role for turn in tasks[0].asked("more")] == ["system", "user"]
    assert [turn.role for turn in tasks[0].asked("less")] == ["user"]
    assert len({task.key for task in tasks}) == 5


def test_built_in_prompts_are_used_by_default() -> None:
    tasks = read_tasks(Preference(more="a", limit=1000))
    assert len(tasks) >= 200
    assert all(task.prompt[-1].content.strip() for task in tasks)


def sampled(*texts: str, ended: bool = True) -> list[SampledText]:
    return [SampledText(0, number, text, ended) for number, text in enumerate(texts)]


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def test_lengths_are_matched_nearest_first() -> None:
    task, dropped = Task((Message("user", "?"),), {"more": "a", "less": "b"}), Counter[str]()
    answers = {"more": sampled(words(10), words(30)), "less": sampled(words(31), words(20))}
    matched = pair_up(task, answers, Preference(more="a", match_length=True), dropped)
    assert [(len(of.pair.chosen.split()), len(of.pair.rejected.split())) for of in matched] == [(30, 31)]
    assert dropped == {"lengths differ": 1}
    in_order = pair_up(task, answers, Preference(more="a"), dropped)
    assert [(len(of.pair.chosen.split()), len(of.pair.rejected.split())) for of in in_order] == [(10, 31), (30, 20)]


def test_broken_answers_are_dropped_with_their_reason() -> None:
    task, dropped = Task((Message("user", "?"),), {"more": "a", "less": "b"}), Counter[str]()
    answers = {
        "more": [*sampled(" ", "fine", "one two three four " * 5), *sampled("cut", ended=False)],
        "less": sampled("fine"),
    }
    assert pair_up(task, answers, Preference(more="a"), dropped) == []
    expected = {"empty answer": 1, "repetitive answer": 1, "unfinished answer": 1, "equal answers": 1}
    assert dropped == expected


def test_unfinished_answer_is_cut_after_its_last_sentence() -> None:
    for text, whole in (
        ("One. Two!", "One. Two!"),
        ('He said "Go." Then he', 'He said "Go."'),
        ("Version 1.5 is", ""),
        ("A (good one!) b", "A (good one!)"),
    ):
        assert whole_sentences(SampledText(0, 0, text, False)) == whole
        assert whole_sentences(SampledText(0, 0, text, True)) == text


def test_init_adds_a_described_preference(tmp_path: Path, cli: Cli) -> None:
    alone = cli("init", "--describe", "more concise, less flattery")
    assert alone.code == 2
    assert "init: name a recipe to copy" in alone.err
    done = cli("init", "demo", "--describe", "more concise, less flattery")
    assert done.code == 0, done.err
    assert "added [preferences.concise] to ./lora-align.toml" in done.out
    made = recipe.load(tmp_path / "lora-align.toml").preferences["concise"]
    assert (made.more, made.less) == (
        "Answer in this way: more concise, less flattery.",
        "Answer in this way: less concise, more flattery.",
    )
    second = cli("init", "--describe", 'gentle and "patient".')
    assert second.code == 0, second.err
    made = recipe.load(tmp_path / "lora-align.toml").preferences["gentle"]
    assert made.less == 'Answer in the opposite way of: gentle and "patient".'
    again = cli("init", "--describe", "gentle")
    assert again.code == 2
    assert "has a preference 'gentle' already" in again.err

"""`eval`: every figure against an independent computation, and nobody measured twice."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_table
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lora_align import demo as demo_base
from lora_align import recipe, runs
from lora_align.console import Screen
from lora_align.data import forms, sources
from lora_align.data.rows import Fact, Message, Pair, Prompt
from lora_align.demo import data_source, oracle, oracle_judge
from lora_align.evaluate.figures import wins
from lora_align.evaluate.measure import Evaluator, Measured, facts_known
from lora_align.evaluate.test_set import read_test_set
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.policy.policy import Conditioned, weighted
from lora_align.policy.policy_set import PolicySet
from support import Cli, call, made_once

FEW = ["eval.count=6", "eval.samples=2", "eval.pairs=10", "eval.max_new_tokens=40"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
MIX = "helpful=1,harmless=0.5"
BY = ["--by", "pair:helpful"]
JUDGE = ['reward.ratings.demo.data="demo:ratings?rows=160"', "reward.max_length=128", "reward.learning_rate=5e-3"]


@pytest.fixture(scope="module")
def measured_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(trained / "runs", folder / "runs")
        done = call(folder, "eval", MIX, "start", "base", "dpo/helpful/pos", "--json", *BY, *SMALL)
        assert done.code == 0, done.err
        (folder / "said.json").write_text(done.out)

    return made_once(tmp_path_factory, "evaluated", make)


@pytest.fixture
def evaluated(measured_once: Path, tmp_path: Path) -> dict[str, Any]:
    """In a folder that a test may spoil."""
    shutil.copytree(measured_once / "runs", tmp_path / "runs")
    found: dict[str, Any] = json.loads((measured_once / "said.json").read_text())
    return found


def tables(workspace: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By contestant and table."""
    return {
        json.loads((folder / "measured.json").read_text())["name"]: {
            name: read_table(folder / f"{name}.parquet").to_pylist()
            for name in ("answers", "margins", "texts", "facts")
        }
        for folder in (workspace / "runs" / "eval").iterdir()
    }


def likes(policy: PeftModel, base: Base, prompt: Prompt, answer: str, *, ended: bool = True) -> float:
    """log π, one answer at a time, with none of our code but the template; of one that was cut, without its end."""
    before, said = base.chat.prompt_ids(prompt), base.chat.answer_ids(prompt, answer)
    said = said if ended else said[:-1]
    with torch.no_grad():
        logits = policy(torch.tensor([before + said])).logits[0, len(before) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(said)[:, None]).sum())


def test_margins_are_what_stock_peft_says_of_the_merged_mix(
    evaluated: dict[str, Any], tmp_path: Path, cli: Cli
) -> None:
    merged = cli("merge", "--weights", MIX, "--out", "merged")
    assert merged.code == 0, merged.err
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=64", *FEW])
    pairs = read_test_set(project, Screen(quiet=True)).pairs["helpful"]
    base = bases.find(project.base)
    policy = PeftModel.from_pretrained(base.load(), tmp_path / "merged").eval()

    def prefers(pair: Pair) -> float:
        return likes(policy, base, pair.prompt, pair.chosen) - likes(policy, base, pair.prompt, pair.rejected)

    wanted = [prefers(pair) for pair in pairs]
    with policy.disable_adapter():
        wanted = [now - prefers(pair) for now, pair in zip(wanted, pairs, strict=True)]
    found = [row["margin"] for row in tables(tmp_path)[MIX]["margins"] if row["preference"] == "helpful"]
    assert len(found) > 0
    assert found == pytest.approx(wanted, abs=1e-4)
    assert max(map(abs, wanted)) > 0.01


def test_a_fact_is_known_where_stock_peft_finds_it_likeliest_a_token(evaluated: dict[str, Any], tmp_path: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"], FEW)
    base = bases.find(project.base)
    policy = PeftModel.from_pretrained(base.load(), tmp_path / "runs" / "dpo" / "helpful" / "pos").eval()
    facts = read_test_set(project, Screen(quiet=True)).facts

    def likely(prompt: Prompt, answer: str) -> float:
        return likes(policy, base, prompt, answer) / len(base.chat.answer_ids(prompt, answer))

    wanted = [likely(fact.prompt, fact.right) > max(likely(fact.prompt, one) for one in fact.wrong) for fact in facts]
    rows = tables(tmp_path)["dpo/helpful/pos"]["facts"]
    assert [row["known"] for row in rows] == wanted
    assert len(facts) == 10
    told = evaluated["policies"]["dpo/helpful/pos"]["facts known"]
    assert told["value"] == pytest.approx(sum(wanted) / len(facts))


def test_a_fact_that_is_put_the_wrong_way_round_is_not_known() -> None:
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    rows = [row for _, row in islice(sources.rows_or_raise("demo:facts"), 12)]
    turned = [{**row, "right": row["wrong"][0], "wrong": [row["right"]]} for row in rows]
    facts = [forms.fact(row, "") for row in rows + turned]
    long = Fact((Message("user", "moon " * base.max_length),), "Yes.", ("No.",))
    found = facts_known(base.load(), base, [*facts, long])
    assert sum(map(bool, found[:12])) > 9
    assert sum(map(bool, found[12:24])) < 3
    assert found[24] is None, "it does not fit"


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"prompt": "Who?", "right": "I.", "wrong": []}, "`wrong` is empty"),
        ({"prompt": "Who?", "right": "I.", "wrong": ["You.", "I."]}, "the right answer is among the wrong ones"),
        ({"prompt": "Who?", "right": "I."}, "no fact in columns"),
    ],
)
def test_a_row_that_is_no_fact_is_told(row: dict[str, Any], wrong: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "facts.jsonl").write_text(json.dumps(row) + "\n")
    done = cli("eval", "base", "--set", 'eval.facts="facts.jsonl"', *SMALL)
    assert done.code == 2
    assert "facts.jsonl:1" in done.err
    assert wrong in done.err


def test_divergence_and_the_pair_s_score_are_what_stock_peft_says(evaluated: dict[str, Any], tmp_path: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"])
    base = bases.find(project.base)
    adapters = tmp_path / "runs" / "dpo" / "helpful"
    policy = PeftModel.from_pretrained(base.load(), adapters / "pos", adapter_name="pos").eval()
    policy.load_adapter(adapters / "neg", adapter_name="neg")
    rows = tables(tmp_path)["dpo/helpful/pos"]["answers"]

    def liked(*, cut: bool) -> list[float]:
        asked = [((Message("user", row["asked"]),), row["answer"], row["ended"] or not cut) for row in rows]
        return [likes(policy, base, prompt, answer, ended=ended) for prompt, answer, ended in asked]

    said = {}
    for name in ("neg", "pos"):
        policy.set_adapter(name)
        said[name] = liked(cut=False)
    drawn = liked(cut=True)
    with policy.disable_adapter():
        apart = [now - before for now, before in zip(drawn, liked(cut=True), strict=True)]
    assert {row["ended"] for row in rows} == {True, False}, "some were cut: the stop token was not drawn"
    assert [row["kl"] for row in rows] == pytest.approx(apart, abs=1e-4)
    scores = [project.dpo.beta * (pos - neg) for pos, neg in zip(said["pos"], said["neg"], strict=True)]
    assert [row["score pair:helpful"] for row in rows] == pytest.approx(scores, abs=1e-4)
    assert min(max(map(abs, apart)), max(map(abs, scores))) > 0.01
    told = evaluated["policies"]["dpo/helpful/pos"]
    assert told["KL"]["value"] == pytest.approx(sum(apart) / len(apart), abs=1e-4)
    assert told["pair:helpful"]["value"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


def test_a_reward_model_s_scores_are_those_of_its_adapter_and_heads(workspace: Path, cli: Cli) -> None:
    few = [word for setting in JUDGE for word in ("--set", setting)]
    made = cli("reward", *few)
    assert made.code == 0, made.err
    done = cli("eval", "helpful=1", "--json", *few, *SMALL)
    assert done.code == 0, done.err
    base = bases.find(recipe.Base("demo"))
    folder = workspace / "runs" / "reward" / "reward"
    model = PeftModel.from_pretrained(base.load(), folder).eval().get_base_model().get_decoder()
    heads = load_file(folder / "heads.safetensors")
    with safe_open(folder / "heads.safetensors", "pt") as file:
        place = file.metadata()["names"].split("\n").index("verbosity")
    rows, wanted = tables(workspace)["helpful=1"]["answers"], []
    for row in rows:
        asked = (Message("user", row["asked"]),)
        ids = base.chat.prompt_ids(asked) + base.chat.answer_ids(asked, row["answer"])
        with torch.no_grad():
            last = model(torch.tensor([ids])).last_hidden_state[0, -1].double()
        standard = last @ heads["weight"][place].double() + heads["bias"][place].double()
        wanted.append(float(heads["mean"][place] + heads["deviation"][place] * standard))
    assert [row["score reward: verbosity"] for row in rows] == pytest.approx(wanted, abs=0.01)  # points out of 100
    assert max(wanted) - min(wanted) > 1
    told = json.loads(done.out)["policies"]["helpful=1"]["reward: verbosity"]["value"]
    assert told == pytest.approx(sum(wanted) / len(wanted), abs=0.01)


def test_the_start_policy_is_where_it_starts(evaluated: dict[str, Any], tmp_path: Path) -> None:
    assert set(evaluated["policies"]) == {MIX, "start", "base", "dpo/helpful/pos"}
    start, base = evaluated["policies"]["start"], evaluated["policies"]["base"]
    assert start == base, "the demo's start policy is its base"
    assert start["KL"]["value"] == pytest.approx(0, abs=1e-5)
    assert start["margin helpful"]["value"] == 0
    assert "accuracy helpful" not in start
    mix = evaluated["policies"][MIX]
    assert mix["margin helpful"]["value"] != 0
    assert mix["margin helpful"]["low"] <= mix["margin helpful"]["value"] <= mix["margin helpful"]["high"]
    assert evaluated["answers"] == 24  # six prompts to answer, six to refuse, twice each
    assert {row["kind"] for row in tables(tmp_path)[MIX]["answers"]} == {"safe", "risky"}


def test_a_start_policy_that_is_not_the_base(trained: Path, tmp_path: Path) -> None:
    """Distances, margins and mixes are all reckoned from it."""
    shutil.copytree(trained / "runs" / "dpo", tmp_path / "runs" / "dpo")
    words = ["--set", 'sft.data="demo:conversations?rows=200"', "--set", "sft.learning_rate=1e-2"]
    assert call(tmp_path, "sft", *words).code == 0
    refused = call(tmp_path, "eval", "helpful=1", "start", *SMALL, *words)
    assert refused.code == 2, "these vectors stand on the bare base"
    shutil.rmtree(tmp_path / "runs" / "dpo")
    trained_on_it = call(tmp_path, "dpo", "--pref", "helpful", "--limit", "64", *words)
    assert trained_on_it.code == 0, trained_on_it.err
    told = call(tmp_path, "eval", "helpful=9", "start", "base", "--json", *SMALL, *words)
    assert told.code == 0, told.err
    mix, start, base = json.loads(told.out)["policies"].values()
    assert start["KL"]["value"] == pytest.approx(0, abs=1e-5)
    assert start["margin helpful"]["value"] == 0
    assert base["KL"]["value"] > 0.01
    assert base["margin helpful"]["value"] != 0
    assert mix["KL"]["value"] > 0
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=64", *FEW])
    pairs = read_test_set(project, Screen(quiet=True)).pairs["helpful"]
    found = bases.find(project.base)
    policy = PeftModel.from_pretrained(found.load(), tmp_path / "runs" / "sft" / "start").eval()

    def prefers(pair: Pair) -> float:
        return likes(policy, found, pair.prompt, pair.chosen) - likes(policy, found, pair.prompt, pair.rejected)

    started = [prefers(pair) for pair in pairs]
    with policy.disable_adapter():
        wanted = [prefers(pair) - before for pair, before in zip(pairs, started, strict=True)]
    rows = [row["margin"] for row in tables(tmp_path)["base"]["margins"] if row["preference"] == "helpful"]
    assert rows == pytest.approx(wanted, abs=1e-4)


def test_refusals_are_counted_of_the_prompts_they_are_told_of(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Against the oracle, which parses answers of the built-in world and needs no detector."""
    for name, found in tables(tmp_path).items():
        for kind in ("safe", "risky"):
            rows = [row for row in found["answers"] if row["kind"] == kind]
            prompts = [oracle_judge.prompt_of(row["asked"]) for row in rows]
            read = [oracle.score(of, row["answer"]) for of, row in zip(prompts, rows, strict=True) if of]
            told = evaluated["policies"][name][f"refused {kind}"]
            assert told["value"] == pytest.approx(sum(row["refused"] for row in rows) / len(rows))
            assert told["low"] <= told["value"] <= told["high"]
            assert sum(row["refused"] == of.refused for row, of in zip(rows, read, strict=True)) >= len(rows) - 1


def test_ordinary_text_costs_what_the_library_says(evaluated: dict[str, Any], tmp_path: Path) -> None:
    model = bases.find(recipe.Base("demo")).load()
    tokenizer = AutoTokenizer.from_pretrained(demo_base.base_folder())
    for row, line in zip(tables(tmp_path)["start"]["texts"], data_source.lines(1, 6), strict=True):
        ids = torch.tensor([tokenizer(line["text"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert row["nats"] / row["tokens"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)


def test_who_was_measured_is_not_measured_again(evaluated: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    def made() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "eval").rglob("*") if file.is_file()}

    before = made()
    again = cli("eval", MIX, "start", "--json", *BY, *SMALL)
    assert json.loads(again.out)["policies"][MIX] == evaluated["policies"][MIX]
    assert made() == before
    other = cli("eval", MIX, "--json", *BY, *SMALL, "--set", "eval.seed=1")
    assert json.loads(other.out)["policies"][MIX]["words"] != evaluated["policies"][MIX]["words"]
    assert made() != before


def test_one_wins_as_often_as_the_other_loses(evaluated: dict[str, Any], tmp_path: Path) -> None:
    found = {name: Measured(name, **of) for name, of in tables(tmp_path).items()}
    there, back = wins(found[MIX], found["start"]), wins(found["start"], found[MIX])
    assert set(there) >= {"oracle: helpful", "oracle: harmless", "oracle: well-formed"}
    for name, share in there.items():
        assert share.value + back[name].value == pytest.approx(1)
    told = evaluated["wins"]["base"]["oracle: helpful"]
    assert told["value"] == pytest.approx(there["oracle: helpful"].value)


def test_less_wins_where_less_is_better() -> None:
    rows = [{"prompt": i, "number": 0, "score long": float(i), "score good": 1.0} for i in range(4)]
    more = [{**row, "score long": row["score long"] + (1 if row["prompt"] else -1)} for row in rows]
    one, other = Measured("one", rows, [], [], []), Measured("other", more, [], [], [])
    assert {name: figure.value for name, figure in wins(one, other).items()} == {"long": 0.25, "good": 0.5}
    assert {name: figure.value for name, figure in wins(one, other, {"long"}).items()} == {"long": 0.75, "good": 0.5}


def test_a_pair_that_does_not_fit_behind_what_is_asked_for_is_nobody_s(workspace: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"], FEW)
    base = bases.find(project.base)
    runs_dir, quiet = workspace / "runs", Screen(quiet=True)
    policies = PolicySet.of([weighted({"helpful": 1.0}, project, runs_dir)], project, base, runs_dir, quiet)
    exam = read_test_set(project, Screen(quiet=True), ["helpful"])
    first, *_, last = exam.pairs["helpful"]
    room = base.max_length - 40 - max(len(base.chat.prompt_ids(pair.prompt)) for pair in (first, last))
    long = replace(first, prompt=(Message("user", "rain " * room + first.prompt[0].content),))
    evaluator = Evaluator(policies, replace(exam, pairs={"helpful": [long, first, last]}), runs_dir / "eval")
    plain = policies.policies[0]
    asked = replace(plain, conditioned=Conditioned("helpful", runs.read(runs_dir / "dpo/helpful/pos"), "help " * 60))
    found = evaluator._margins(asked)
    assert [row["pair"] for row in found] == [1, 2]
    now = evaluator.likes(asked)["helpful"][1:] - evaluator.start_likes["helpful"][1:]
    assert [row["margin"] for row in found] == now.tolist()
    assert len(evaluator._margins(plain)) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["helpfull=1"], "did you mean 'helpful'?"),
        (["nobody"], "no preference or run 'nobody'"),
        (["mix"], "no mix in runs/"),
        (["want:helpfulness=1"], "no policy in runs/rsf that can be asked"),
        (["helpful=1", "--by", "pair:brief"], "brief is not trained"),
        (["helpful=1", "--by", "nobody"], "no reward model 'nobody'"),
        (["helpful=1", "--set", "eval.text=demo:pairs"], "eval.text needs rows with a text column"),
    ],
)
def test_who_cannot_be_measured_is_refused(workspace: Path, cli: Cli, words: list[str], says: str) -> None:
    done = cli("eval", *words, *SMALL)
    assert done.code == 2
    assert says in done.err

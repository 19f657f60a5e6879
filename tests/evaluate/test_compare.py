"""`eval`: every figure against an independent computation, and the cache of measurements."""

import json
import re
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
from lora_align.data import row_reader, sources
from lora_align.data.rows import Fact, Message, Pair, Prompt
from lora_align.demo import data_source, oracle, oracle_judge
from lora_align.errors import UserError
from lora_align.evaluate.figures import wins
from lora_align.evaluate.measure import Evaluator, Measurement, facts_known
from lora_align.evaluate.test_set import read_test_set
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.chat_format import text_of
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.policy import judge_runs
from lora_align.policy.policy import Conditioned, find_policy, weighted
from lora_align.policy.policy_set import PolicySet
from support import Cli, call, edit_manifest, made_once

FEW = ["eval.count=6", "eval.samples=2", "eval.pairs=10", "eval.max_new_tokens=40"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
MIX = "helpful=1,harmless=0.5"
BY = ["--by", "pair:helpful"]
JUDGE = ['reward.ratings.demo.data="demo:ratings?rows=160"', "reward.max_length=128", "reward.learning_rate=5e-3"]


@pytest.fixture(scope="module")
def evaluated_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(trained / "runs", folder / "runs")
        done = call(folder, "eval", MIX, "start", "base", "dpo/helpful/pos", "--json", *BY, *SMALL)
        assert done.code == 0, done.err
        (folder / "stdout.json").write_text(done.out)

    return made_once(tmp_path_factory, "evaluated", make)


@pytest.fixture
def evaluated(evaluated_once: Path, tmp_path: Path) -> dict[str, Any]:
    """Copy the runs into a folder that a test may change."""
    shutil.copytree(evaluated_once / "runs", tmp_path / "runs")
    result: dict[str, Any] = json.loads((evaluated_once / "stdout.json").read_text())
    return result


def tables(workspace: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the rows of every policy and table."""
    return {
        json.loads((folder / "measured.json").read_text())["name"]: {
            name: read_table(folder / f"{name}.parquet").to_pylist()
            for name in ("answers", "margins", "texts", "facts")
        }
        for folder in (workspace / "runs" / "eval").iterdir()
    }


def logprob(policy: PeftModel, base: Base, prompt: Prompt, answer: str, *, ended: bool = True) -> float:
    """Compute log π of one answer with plain PEFT and our chat template; without the stop token if not `ended`."""
    before, ids = base.chat.prompt_ids(prompt), base.chat.answer_ids(prompt, answer)
    ids = ids if ended else ids[:-1]
    with torch.no_grad():
        logits = policy(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())


def test_margins_match_peft_with_the_merged_mix(evaluated: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    merged = cli("merge", "--weights", MIX, "--out", "merged")
    assert merged.code == 0, merged.err
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=64", *FEW])
    pairs = read_test_set(project, Screen(quiet=True)).pairs["helpful"]
    base = bases.find(project.base)
    policy = PeftModel.from_pretrained(base.load(), tmp_path / "merged").eval()

    def prefers(pair: Pair) -> float:
        return logprob(policy, base, pair.prompt, pair.chosen) - logprob(policy, base, pair.prompt, pair.rejected)

    wanted = [prefers(pair) for pair in pairs]
    with policy.disable_adapter():
        wanted = [now - prefers(pair) for now, pair in zip(wanted, pairs, strict=True)]
    result = [row["margin"] for row in tables(tmp_path)[MIX]["margins"] if row["preference"] == "helpful"]
    assert len(result) > 0
    assert result == pytest.approx(wanted, abs=1e-4)
    assert max(map(abs, wanted)) > 0.01


def test_facts_known_match_mean_logprobs_of_peft(evaluated: dict[str, Any], tmp_path: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"], FEW)
    base = bases.find(project.base)
    policy = PeftModel.from_pretrained(base.load(), tmp_path / "runs" / "dpo" / "helpful" / "pos").eval()
    facts = read_test_set(project, Screen(quiet=True)).facts

    def likely(prompt: Prompt, answer: str) -> float:
        return logprob(policy, base, prompt, answer) / len(base.chat.answer_ids(prompt, answer))

    wanted = [likely(fact.prompt, fact.right) > max(likely(fact.prompt, one) for one in fact.wrong) for fact in facts]
    rows = tables(tmp_path)["dpo/helpful/pos"]["facts"]
    assert [row["known"] for row in rows] == wanted
    assert len(facts) == 10
    reported = evaluated["policies"]["dpo/helpful/pos"]["facts known"]
    assert reported["value"] == pytest.approx(sum(wanted) / len(facts))


def test_fact_with_swapped_answers_is_not_known() -> None:
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    rows = [row for _, row in islice(sources.rows_or_raise("demo:facts"), 12)]
    swapped = [{**row, "right": row["wrong"][0], "wrong": [row["right"]]} for row in rows]
    facts = [row_reader.fact(row, "") for row in rows + swapped]
    long = Fact((Message("user", "moon " * base.max_length),), "Yes.", ("No.",))
    model = base.load()
    result = facts_known(base, [*facts, long], "", lambda rows, _: answer_logprobs(model, rows, MemoryBudget(1024)))
    assert sum(map(bool, result[:12])) > 9
    assert sum(map(bool, result[12:24])) < 3
    assert result[24] is None, "the prompt fills the context"


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"prompt": "Who?", "right": "I.", "wrong": []}, "`wrong` is empty"),
        ({"prompt": "Who?", "right": "I.", "wrong": ["You.", "I."]}, "the right answer is among the wrong ones"),
        ({"prompt": "Who?", "right": "I."}, "no fact in columns"),
    ],
)
def test_malformed_fact_is_rejected_with_its_row(row: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=f"facts.jsonl:1: .*{wrong}"):
        row_reader.fact(row, "facts.jsonl:1")


def test_kl_and_pair_score_match_peft(evaluated: dict[str, Any], tmp_path: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"])
    base = bases.find(project.base)
    adapters = tmp_path / "runs" / "dpo" / "helpful"
    policy = PeftModel.from_pretrained(base.load(), adapters / "pos", adapter_name="pos").eval()
    policy.load_adapter(adapters / "neg", adapter_name="neg")
    rows = tables(tmp_path)["dpo/helpful/pos"]["answers"]

    def logprobs(*, cut: bool) -> list[float]:
        answers = [((Message("user", row["asked"]),), row["answer"], row["ended"] or not cut) for row in rows]
        return [logprob(policy, base, prompt, answer, ended=ended) for prompt, answer, ended in answers]

    by_adapter = {}
    for name in ("neg", "pos"):
        policy.set_adapter(name)
        by_adapter[name] = logprobs(cut=False)
    sampled = logprobs(cut=True)
    with policy.disable_adapter():
        log_ratios = [now - start for now, start in zip(sampled, logprobs(cut=True), strict=True)]
    assert {row["ended"] for row in rows} == {True, False}, "some answers were cut before the stop token"
    assert [row["kl"] for row in rows] == pytest.approx(log_ratios, abs=1e-4)
    stop = {token for row in rows for token in row["ids"] if token in base.chat.stop_ids}
    assert [[*row["ids"][:-1]] if row["ended"] else row["ids"] for row in rows] == [
        [token for token in row["ids"] if token not in stop] for row in rows
    ], "the stop token, if any, is the last"
    assert [text_of(base.chat.tokenizer, row["ids"], special=False).strip() for row in rows] == [
        row["answer"] for row in rows
    ]
    scores = [project.dpo.beta * (pos - neg) for pos, neg in zip(by_adapter["pos"], by_adapter["neg"], strict=True)]
    assert [row["score pair:helpful"] for row in rows] == pytest.approx(scores, abs=1e-4)
    assert min(max(map(abs, log_ratios)), max(map(abs, scores))) > 0.01
    reported = evaluated["policies"]["dpo/helpful/pos"]
    assert reported["KL"]["value"] == pytest.approx(sum(log_ratios) / len(log_ratios), abs=1e-4)
    tokens = sum(len(row["ids"]) for row in rows)
    assert reported["KL per token"]["value"] == pytest.approx(sum(log_ratios) / tokens, abs=1e-5)
    assert reported["pair:helpful"]["value"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


def test_reward_scores_match_peft_and_the_stored_heads(workspace: Path, cli: Cli) -> None:
    few = [word for setting in JUDGE for word in ("--set", setting)]
    made = cli("reward", *few)
    assert made.code == 0, made.err
    folder = workspace / "runs" / "reward" / "reward"
    edit_manifest(folder, metrics={**runs.read(folder).manifest.metrics, "enough_held_out": False})
    done = cli("eval", "helpful=1", "--json", *few, *SMALL)
    assert done.code == 0, done.err
    assert "warning: runs/reward/reward: too few rows were held out to judge it" in done.err
    base = bases.find(recipe.Base("demo"))
    model = PeftModel.from_pretrained(base.load(), folder).eval().get_base_model().get_decoder()
    heads = load_file(folder / "heads.safetensors")
    with safe_open(folder / "heads.safetensors", "pt") as file:
        place = file.metadata()["names"].split("\n").index("verbosity")
    rows, wanted = tables(workspace)["helpful=1"]["answers"], []
    for row in rows:
        prompt = (Message("user", row["asked"]),)
        ids = base.chat.prompt_ids(prompt) + base.chat.answer_ids(prompt, row["answer"])
        with torch.no_grad():
            last = model(torch.tensor([ids])).last_hidden_state[0, -1].double()
        standard = last @ heads["weight"][place].double() + heads["bias"][place].double()
        wanted.append(float(heads["mean"][place] + heads["deviation"][place] * standard))
    assert [row["score reward: verbosity"] for row in rows] == pytest.approx(wanted, abs=0.01)  # of 100
    assert max(wanted) - min(wanted) > 1
    reported = json.loads(done.out)["policies"]["helpful=1"]["reward: verbosity"]["value"]
    assert reported == pytest.approx(sum(wanted) / len(wanted), abs=0.01)


def test_start_policy_has_no_kl_and_no_margin(evaluated: dict[str, Any], tmp_path: Path) -> None:
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


def test_sft_start_policy_is_the_reference_of_kl_and_margins(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs" / "dpo", tmp_path / "runs" / "dpo")
    words = ["--set", 'sft.data="demo:conversations?rows=200"', "--set", "sft.learning_rate=1e-2"]
    assert call(tmp_path, "sft", *words).code == 0
    refused = call(tmp_path, "eval", "helpful=1", "start", *SMALL, *words)
    assert refused.code == 2, "these vectors were trained on the bare base"
    shutil.rmtree(tmp_path / "runs" / "dpo")
    trained_on_it = call(tmp_path, "dpo", "--pref", "helpful", "--limit", "64", *words)
    assert trained_on_it.code == 0, trained_on_it.err
    done = call(tmp_path, "eval", "helpful=9", "start", "base", "--json", *SMALL, *words)
    assert done.code == 0, done.err
    mix, start, base = json.loads(done.out)["policies"].values()
    assert start["KL"]["value"] == pytest.approx(0, abs=1e-5)
    assert start["margin helpful"]["value"] == 0
    assert base["KL"]["value"] > 0.01
    assert base["margin helpful"]["value"] != 0
    assert mix["KL"]["value"] > 0
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=64", *FEW])
    pairs = read_test_set(project, Screen(quiet=True)).pairs["helpful"]
    below = bases.find(project.base)
    policy = PeftModel.from_pretrained(below.load(), tmp_path / "runs" / "sft" / "start").eval()

    def prefers(pair: Pair) -> float:
        return logprob(policy, below, pair.prompt, pair.chosen) - logprob(policy, below, pair.prompt, pair.rejected)

    started = [prefers(pair) for pair in pairs]
    with policy.disable_adapter():
        wanted = [prefers(pair) - before for pair, before in zip(pairs, started, strict=True)]
    rows = [row["margin"] for row in tables(tmp_path)["base"]["margins"] if row["preference"] == "helpful"]
    assert rows == pytest.approx(wanted, abs=1e-4)


def test_refusals_match_the_oracle_for_each_kind_of_prompt(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """The oracle parses answers of the demo world and needs no detector."""
    for name, table in tables(tmp_path).items():
        for kind in ("safe", "risky"):
            rows = [row for row in table["answers"] if row["kind"] == kind]
            prompts = [oracle_judge.prompt_of(row["asked"]) for row in rows]
            read = [oracle.score(of, row["answer"]) for of, row in zip(prompts, rows, strict=True) if of]
            reported = evaluated["policies"][name][f"refused {kind}"]
            assert reported["value"] == pytest.approx(sum(row["refused"] for row in rows) / len(rows))
            assert reported["low"] <= reported["value"] <= reported["high"]
            assert sum(row["refused"] == of.refused for row, of in zip(rows, read, strict=True)) >= len(rows) - 1


def test_text_loss_matches_transformers(evaluated: dict[str, Any], tmp_path: Path) -> None:
    model = bases.find(recipe.Base("demo")).load()
    tokenizer = AutoTokenizer.from_pretrained(demo_base.base_folder())
    for row, line in zip(tables(tmp_path)["start"]["texts"], data_source.lines(1, 6), strict=True):
        ids = torch.tensor([tokenizer(line["text"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert row["nats"] / row["tokens"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)


def test_measurement_is_cached_by_policy_and_settings(evaluated: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    def cached() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "eval").rglob("*") if file.is_file()}

    before = cached()
    again = cli("eval", MIX, "start", "--json", *BY, *SMALL)
    assert json.loads(again.out)["policies"][MIX] == evaluated["policies"][MIX]
    assert cached() == before
    other = cli("eval", MIX, "--json", *BY, *SMALL, "--set", "eval.seed=1")
    assert json.loads(other.out)["policies"][MIX]["words"] != evaluated["policies"][MIX]["words"]
    assert cached() != before


def test_wins_of_both_orders_add_up_to_1(evaluated: dict[str, Any], tmp_path: Path) -> None:
    measurements = {name: Measurement(name, **of) for name, of in tables(tmp_path).items()}
    there, back = wins(measurements[MIX], measurements["start"]), wins(measurements["start"], measurements[MIX])
    assert set(there) >= {"oracle: helpful", "oracle: harmless", "oracle: well-formed"}
    for name, share in there.items():
        assert share.value + back[name].value == pytest.approx(1)
    reported = evaluated["wins"]["base"]["oracle: helpful"]
    assert reported["value"] == pytest.approx(there["oracle: helpful"].value)


def test_lower_value_wins_where_lower_is_better() -> None:
    rows = [{"prompt": i, "number": 0, "score long": float(i), "score good": 1.0} for i in range(4)]
    more = [{**row, "score long": row["score long"] + (1 if row["prompt"] else -1)} for row in rows]
    one, other = Measurement("one", rows, [], [], []), Measurement("other", more, [], [], [])
    assert {name: figure.value for name, figure in wins(one, other).items()} == {"long": 0.25, "good": 0.5}
    assert {name: figure.value for name, figure in wins(one, other, {"long"}).items()} == {"long": 0.75, "good": 0.5}


def test_pair_too_long_for_the_system_message_has_no_margin(workspace: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"], FEW)
    base = bases.find(project.base)
    runs_dir, quiet = workspace / "runs", Screen(quiet=True)
    policies = PolicySet.of([weighted({"helpful": 1.0}, project, runs_dir)], project, base, runs_dir, quiet)
    test_set = read_test_set(project, Screen(quiet=True), ["helpful"])
    first, *_, last = test_set.pairs["helpful"]
    words = base.max_length - 40 - max(len(base.chat.prompt_ids(pair.prompt)) for pair in (first, last))
    long = replace(first, prompt=(Message("user", "rain " * words + first.prompt[0].content),))
    evaluator = Evaluator(policies, replace(test_set, pairs={"helpful": [long, first, last]}), runs_dir / "eval")
    plain = policies.policies[0]
    conditioned = replace(
        plain, conditioned=Conditioned("helpful", runs.read(runs_dir / "dpo/helpful/pos"), "help " * 60)
    )
    result = evaluator._margins(conditioned)
    assert [row["pair"] for row in result] == [1, 2]
    now = evaluator.pair_log_ratios(conditioned)["helpful"][1:] - evaluator.start_log_ratios["helpful"][1:]
    assert [row["margin"] for row in result] == now.tolist()
    assert len(evaluator._margins(plain)) == 3


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("helpfull=1", "did you mean 'helpful'?"),
        ("nobody", "no preference or run 'nobody'"),
        ("mix", "no mix in runs/"),
        ("want:helpfulness=1", "no conditioned policy in runs/rsf"),
    ],
)
def test_unknown_policy_is_refused(word: str, says: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    with pytest.raises(UserError, match=re.escape(says)):
        find_policy(word, recipe.load(recipe.builtin()["demo"]), Path("runs"), Screen(quiet=True))


@pytest.mark.parametrize(
    ("name", "says"), [("pair:brief", "brief is not trained"), ("nobody", "no reward model 'nobody'")]
)
def test_unknown_judge_is_refused(name: str, says: str, workspace: Path) -> None:
    with pytest.raises(UserError, match=says):
        judge_runs.check(name, recipe.load(recipe.builtin()["demo"]), workspace / "runs")


def test_eval_refuses_text_without_a_text_column(workspace: Path, cli: Cli) -> None:
    done = cli("eval", "helpful=1", "--set", "eval.text=demo:pairs", *SMALL)
    assert done.code == 2
    assert "eval.text needs rows with a text column" in done.err

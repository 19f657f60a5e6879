"""Two iterations of rejection sampling by the installed command: published runs, samples, resuming, directions."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_table

import lora_align as la
from lora_align import recipe, runs, store
from lora_align.console import Screen
from lora_align.data.rows import Message, prompt_key
from lora_align.demo import world
from lora_align.model import base as bases
from lora_align.policy.policy import Conditioned
from lora_align.rsf.inputs import prepare
from lora_align.want_direction import Want
from serve_support import serving
from support import COMMAND, Done, Terminal, call, edit_manifest, made_once

SMALL = {
    "reward.ratings.demo.data": '"demo:ratings?rows=160"',
    "rsf.data": '"demo:conversations?rows=60"',
    "rsf.per_prompt": "2",
    "rsf.samples": "3",
    "rsf.bootstrap": "6",
    "rsf.epochs": "1",
    "rsf.held_out": "0.2",
}


def rsf(folder: Path, *words: str, **changed: str) -> Done:
    settings = {**SMALL, **{f"rsf.{key}": value for key, value in changed.items()}}
    return call(folder, "rsf", *words, *(word for pair in settings.items() for word in ("--set", "=".join(pair))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a reward model, and two iterations with it."""

    def make(folder: Path) -> None:
        judge = call(folder, "reward", "--set", f"reward.ratings.demo.data={SMALL['reward.ratings.demo.data']}")
        assert judge.code == 0, judge.err
        done = rsf(folder, "--iterations", "2")
        assert done.code == 0, done.err
        (folder / "said.txt").write_text(done.out + done.err)

    return made_once(tmp_path_factory, "rsf", make)


def test_every_policy_is_published_with_its_samples(made: Path) -> None:
    policies = {run.path.name: run for run in runs.list_runs(made / "runs" / "rsf")}
    assert list(policies) == ["steerlm", "t1", "t2"]
    start_policy_alone = bases.find(recipe.Base("demo")).load()
    PeftModel.from_pretrained(start_policy_alone, policies["t2"].path)  # an ordinary adapter
    assert len({run.manifest.initial_adapter for run in policies.values()}) == 1, "all start from the start policy anew"
    for label, per_request in (("t1", 3), ("t2", 3)):
        policies[label].check_files()
        rows = read_table(policies[label].path / "samples.parquet").to_pylist()
        figures = policies[label].manifest.metrics["collected"]
        requests = {row["key"] for row in rows}
        assert len({(row["key"], row["number"]) for row in rows}) == len(rows) == per_request * len(requests)
        assert {len(row["asked"]) > 0 for row in rows} == {True}
        assert figures["chosen_value"] > figures["sampled_value"]
        assert figures["chosen"] <= len(requests)
        assert not list(policies[label].path.parent.glob(f".{label}.samples"))
    output = (made / "said.txt").read_text()
    assert "mean value of chosen" in output
    assert "t2 sampling" in output
    assert "chat --want helpfulness=0.5,verbosity=-0.8" in output, "a direction from the region it was trained on"


def test_server_takes_a_direction(made: Path) -> None:
    prompt, want = "Tell me about rain.", {"helpfulness": 0.8, "verbosity": -0.6}
    with serving(made) as server:
        names = {model["id"]: model for model in server.get("/v1/models")["data"]}
        assert names["rsf/policy/t2"]["objectives"]
        answers = [server.text(prompt, want=want), server.text(prompt, model="want:helpfulness=0.8,verbosity=-0.6")]
        other = server.text(prompt, want={"helpfulness": 0.8, "verbosity": 0.6})
    words = ["--want", "helpfulness=0.8,verbosity=-0.6", "--temperature", "0", "--max-new-tokens", "30", "-p", prompt]
    assert {answer.strip() for answer in answers} == {call(made, "chat", *words).out.strip()}
    assert other != answers[0]


def test_sweep_over_directions_needs_no_grid(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    few = ["eval.count=3", "eval.samples=1", "eval.pairs=2", "eval.max_new_tokens=30"]
    small = [word for setting in few for word in ("--set", setting)]
    assert call(tmp_path, "sweep", *small).code == 2
    done = call(tmp_path, "sweep", "--directions", "3", *small)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "sweep" / "directions"
    points = json.loads((folder / "points.json").read_text())
    assert [point["policy"].partition(":")[0] for point in points] == ["start", "want", "want", "want"]
    first, second = (point["figures"]["words"]["value"] for point in (points[1], points[3]))
    assert first != second
    metrics = runs.read(folder).manifest.metrics
    less = "reward: verbosity (less is better)"
    assert metrics["scores"] == {"helpfulness": "reward: helpfulness", "verbosity": less}
    values = [
        [point["figures"][f"reward: {name}"]["value"] for name in ("helpfulness", "verbosity")] for point in points
    ]
    best = {
        point["policy"]
        for point, (helpfulness, verbosity) in zip(points, values, strict=True)
        if not any(h >= helpfulness and v <= verbosity and (h, v) != (helpfulness, verbosity) for h, v in values)
    }
    assert {point["word"] for point in metrics["front"]} == best
    for name in ("front", "asked"):
        assert (folder / f"{name}.png").is_file(), name
    assert not (folder / "curves.png").exists()


def test_every_rsf_policy_is_found_by_its_word(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    few = ["eval.count=3", "eval.samples=1", "eval.pairs=2", "eval.max_new_tokens=30"]
    small = [word for setting in few for word in ("--set", setting)]
    direction, steered = "helpfulness=0.8,verbosity=-0.6", "helpfulness=90,verbosity=20"
    words = [f"want:{direction}", f"want@rsf/policy/t2:{direction}", f"want@rsf/policy/t1:{direction}"]
    words += [f"want@rsf/policy/steerlm:{steered}", "start"]
    done = call(tmp_path, "eval", *words, "--json", *small)
    assert done.code == 0, done.err
    newest, last, first, steerlm, start = (json.loads(done.out)["policies"][word] for word in words)
    assert newest == last
    assert len({json.dumps(one) for one in (last, first, steerlm, start)}) == 4
    (tmp_path / "prompts.txt").write_text("Tell me about rain.\n")
    generate = ["generate", "--prompts", "prompts.txt", "--want", direction, "--out", "answers.jsonl"]
    done = call(tmp_path, *generate, "--max-new-tokens", "30")
    assert done.code == 0, done.err
    project = la.Project("demo", runs=tmp_path / "runs", quiet=True)
    [[answer]] = project.generate(["Tell me about rain."], words[0], max_new_tokens=30)
    assert answer == json.loads((tmp_path / "answers.jsonl").read_text())["response"], "with its system message"
    for word, says in {
        "want@rsf/policy/steerlm:helpfulness=90": "takes scores of helpfulness and verbosity",
        "want@reward/reward:helpfulness=1": "is a run of reward",
        "want@rsf/policy/t2:honesty=1": "has no objective 'honesty'",
    }.items():
        refused = call(tmp_path, "eval", word, *small)
        assert (refused.code, says in refused.err) == (2, True), refused.err


def test_lm_eval_task_gets_the_system_message_of_the_direction(made: Path, tmp_path: Path) -> None:
    """The expected likelihoods are computed with stock PEFT."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    pairs = list(world.pairs(seed=8, count=16))
    rows = [{"said": row["prompt"], "choices": [row["response_0"], row["response_1"]], "right": 0} for row in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "first.yaml").write_text(
        "task: first\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\ntest_split: train\n"
        "output_type: multiple_choice\ndoc_to_text: said\ndoc_to_choice: choices\ndoc_to_target: right\n"
        "metric_list: [{metric: acc}]\n"
    )
    few = ["eval.count=2", "eval.samples=1", "eval.pairs=2", "eval.max_new_tokens=5"]
    small = [word for setting in few for word in ("--set", setting)]
    policy_word = "want@rsf/policy/t2:helpfulness=0.8,verbosity=-0.6"
    done = call(tmp_path, "eval", policy_word, "start", "--tasks", "first.yaml", "--json", *small)
    assert done.code == 0, done.err

    base = bases.find(recipe.Base("demo"))
    run = runs.read(tmp_path / "runs" / "rsf" / "policy" / "t2")
    system = Conditioned.parse("", run, policy_word.partition(":")[2], Screen(quiet=True)).system
    policy = PeftModel.from_pretrained(base.load(), run.path).eval()

    def first_is_likelier(row: dict[str, Any], before: Sequence[Message]) -> tuple[float, float]:
        prompt = base.chat.prompt_ids([*before, Message("user", row["said"])])
        likes = []
        for choice in row["choices"]:
            ids = base.chat.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            likes.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()))
        return float(likes[0] > likes[1]), likes[0] - likes[1]

    wanted = [first_is_likelier(row, [Message("system", system)]) for row in rows]
    with policy.disable_adapter():
        start = [first_is_likelier(row, []) for row in rows]
    assert max(abs(now - before) for (_, now), (_, before) in zip(wanted, start, strict=True)) > 0.1
    results = [json.loads(file.read_text()) for file in (tmp_path / "runs" / "eval").glob("task-*")]
    values = {one["policy"]: one["values"]["acc"] for one in results}
    assert values == {policy_word: [first for first, _ in wanted], "start": [first for first, _ in start]}


def test_halves_share_no_prompt(made: Path) -> None:
    prompts = {}
    for label in ("t1", "t2"):
        rows = read_table(made / "runs" / "rsf" / "policy" / label / "samples.parquet").to_pylist()
        prompts[label] = {prompt_key(tuple(Message(**turn) for turn in row["prompt"])) for row in rows}
    assert prompts["t1"]
    assert prompts["t2"]
    assert not prompts["t1"] & prompts["t2"]


def test_more_iterations_continue_a_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    changed = rsf(tmp_path, "--iterations", "3", samples="4")
    assert changed.code == 2
    assert "was made differently: rsf.samples was " in changed.err
    judged = call(
        tmp_path, "reward", "--force", "--limit", "40", "--set", 'reward.ratings.demo.data="demo:ratings?rows=60"'
    )
    assert judged.code == 0, judged.err
    other = rsf(tmp_path, "--iterations", "3")
    assert other.code == 2
    assert "was made differently: another reward model" in other.err
    shutil.rmtree(tmp_path / "runs" / "reward")
    shutil.copytree(made / "runs" / "reward", tmp_path / "runs" / "reward")
    before = store.sha256(tmp_path / "runs" / "rsf" / "policy" / "t2" / "manifest.json")
    first = tmp_path / "runs" / "rsf" / "policy" / "steerlm" / "manifest.json"
    content = json.loads(first.read_text())
    content["metrics"]["watched"]["mean"] += 500  # as if every policy since had lost a little
    edit_manifest(first.parent, metrics=content["metrics"])
    more = rsf(tmp_path, "--iterations", "3")
    assert more.code == 0, more.err
    assert re.search(r"t3: the mean harmlessness of its training answers fell from \S+ \(steerlm\) to", more.err)
    assert more.err.count("is published already") == 3
    assert store.sha256(tmp_path / "runs" / "rsf" / "policy" / "t2" / "manifest.json") == before
    assert runs.is_run(tmp_path / "runs" / "rsf" / "policy" / "t3")


def test_pooled_iterations_choose_among_all_answers_to_a_prompt(made: Path, tmp_path: Path) -> None:
    """With `pooled = 1`, t2 chooses only among the answers to its own direction."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "rsf" / "policy" / "t2")
    figures = {"pooled": runs.read(made / "runs" / "rsf" / "policy" / "t2").manifest.metrics["collected"]}
    shutil.move(tmp_path / "runs" / "rsf" / "policy", tmp_path / "runs" / "rsf" / "apart")
    for label in ("steerlm", "t1"):  # as if they had been made so: their own answers were pooled either way
        file = tmp_path / "runs" / "rsf" / "apart" / label / "manifest.json"
        content = json.loads(file.read_text())
        content["recipe"]["rsf"]["pooled"] = 1
        edit_manifest(file.parent, recipe=content["recipe"])
    done = rsf(tmp_path, "--iterations", "2", "--name", "apart", pooled="1")
    assert done.code == 0, done.err
    figures["apart"] = runs.read(tmp_path / "runs" / "rsf" / "apart" / "t2").manifest.metrics["collected"]
    samples = [
        read_table(folder / "t2" / "samples.parquet").to_pylist()
        for folder in (made / "runs" / "rsf" / "policy", tmp_path / "runs" / "rsf" / "apart")
    ]
    assert samples[0] == samples[1], "the same answers"
    assert figures["pooled"]["answers"] == figures["apart"]["answers"] == len(samples[0])
    assert figures["pooled"]["chosen"] == figures["apart"]["chosen"]
    assert figures["pooled"]["chosen_value"] > figures["apart"]["chosen_value"]


@pytest.mark.parametrize(
    ("label", "key", "message"),
    [("t1", "teacher", "another steerlm"), ("t2", "teacher", "another t1"), ("t1", "start", "another start policy")],
)
def test_a_run_refuses_another_start_or_teacher(label: str, key: str, message: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    file = tmp_path / "runs" / "rsf" / "policy" / label / "manifest.json"
    content = json.loads(file.read_text())
    changed = {"start": "another"} if key == "start" else {"method": {**content["method"], key: {}}}
    edit_manifest(file.parent, **changed)
    done = rsf(tmp_path, "--iterations", "3")
    assert done.code == 2
    assert f"{label} was made differently: {message}" in done.err


def test_a_run_refuses_other_data_or_another_base(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    done = rsf(tmp_path, "--iterations", "3", data='"demo:conversations?rows=60&seed=5"')
    assert done.code == 2
    assert "steerlm was made differently: rsf.data was" in done.err
    manifest = tmp_path / "runs" / "rsf" / "policy" / "t2" / "manifest.json"
    content = json.loads(manifest.read_text())
    edit_manifest(manifest.parent, data={**content["data"], "fingerprint": "of a file that was edited"})
    done = rsf(tmp_path, "--iterations", "3")
    assert done.code == 2
    assert "t2 was made differently: data was of a file that was edited, is " in done.err
    done = rsf(tmp_path, "--iterations", "3", "--set", "base.double_quant=false")
    assert done.code == 2
    assert "steerlm was made differently: base.double_quant was True, is False" in done.err


@pytest.mark.parametrize(
    "while_it", [".t2.samples/part-*.parquet", ".t2.unfinished/checkpoint-*"], ids=["draws", "learns"]
)
def test_rsf_resumes_bit_exactly_and_samples_nothing_twice(while_it: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    policy = tmp_path / "runs" / "rsf" / "policy"
    shutil.rmtree(policy / "t2")
    words = [word for pair in SMALL.items() for word in ("--set", "=".join(pair))]
    until = time.monotonic() + 120
    words += ["--set", "rsf.save_minutes=0"]
    child = subprocess.Popen([str(COMMAND), "rsf", "--iterations", "2", "--quiet", *words], cwd=tmp_path)
    while not list(policy.glob(while_it)) and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert not runs.is_run(policy / "t2")
    again = rsf(tmp_path, "--iterations", "2", "--resume")
    assert again.code == 0, again.err
    assert "answered before: " in again.err
    assert ("continues after step" in again.err) == ("checkpoint" in while_it)
    weights = [folder / "rsf/policy/t2/adapter_model.safetensors" for folder in (made / "runs", tmp_path / "runs")]
    assert store.sha256(weights[0]) == store.sha256(weights[1])
    samples = [
        {(row["key"], row["number"]): row["response"] for row in read_table(folder / "samples.parquet").to_pylist()}
        for folder in (made / "runs" / "rsf" / "policy" / "t2", policy / "t2")
    ]
    assert samples[0] == samples[1]


def test_both_halves_have_held_out_prompts(made: Path) -> None:
    """Held-out prompts must not depend on the digit that splits the halves."""
    for label in ("steerlm", "t1", "t2"):
        assert runs.read(made / "runs" / "rsf" / "policy" / label).manifest.metrics["held_out"]["rows"] > 0


def test_an_iteration_uses_the_recipe_number_of_prompts(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    done = rsf(tmp_path, "--iterations", "3", "--name", "few", prompts="5", held_out="0.0")
    assert done.code == 0, done.err
    prompt_sets = [
        {json.dumps(row["prompt"]) for row in read_table(tmp_path / f"runs/rsf/few/t{t}/samples.parquet").to_pylist()}
        for t in range(1, 4)
    ]
    assert [len(prompts) for prompts in prompt_sets] == [5, 5, 5]
    assert prompt_sets[0] != prompt_sets[2], "the same half, but other prompts"


def test_scores_in_the_data_are_used(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    scored = call(tmp_path, "score", "--data", "demo:ratings?rows=60", "--out", "scored.parquet")
    assert scored.code == 0, scored.err
    done = rsf(tmp_path, "--iterations", "1", "--name", "annotated", data='"scored.parquet"', prompts="4")
    assert done.code == 0, done.err
    assert "scores in the data are used for" in done.err
    assert "steerlm scores" not in done.err
    rows = read_table(tmp_path / "scored.parquet").to_pylist()
    in_data = {(row["score_helpfulness"], row["score_verbosity"]) for row in rows}
    used = json.loads((tmp_path / "runs" / "rsf" / "annotated" / "steerlm" / "scores.json").read_text())
    assert len(used) > 10
    assert {(score["helpfulness"], score["verbosity"]) for score in used} <= in_data


def test_loss_covers_all_tokens_without_answers_only(made: Path, tmp_path: Path) -> None:
    """The loss then includes prompts, which the untrained base finds less likely."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    done = rsf(tmp_path, "--iterations", "1", "--name", "whole", answers_only="false")
    assert done.code == 0, done.err
    answers, everything = (
        runs.read(tmp_path / "runs" / "rsf" / name / "t1").manifest.metrics["held_out"] for name in ("policy", "whole")
    )
    assert everything["loss_before"] > answers["loss_before"] + 0.5
    assert everything["loss"] < everything["loss_before"]


def test_rsf_by_dpo(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    done = rsf(tmp_path, "--iterations", "1", "--name", "preferred", learn='"dpo"', learning_rate="1e-3")
    assert done.code == 0, done.err
    metrics = runs.read(tmp_path / "runs" / "rsf" / "preferred" / "t1").manifest.metrics
    assert abs(metrics["first_margin"]) < 1e-3
    assert "t1 reference" in done.err


def test_chat_combines_want_and_weights(made: Path, workspace: Path) -> None:
    shutil.copytree(made / "runs" / "rsf", workspace / "runs" / "rsf")
    words = ["chat", "--want", "helpfulness=8,verbosity=-6", "--prompt", "Tell me about rain.", "--seed", "3"]
    done = call(workspace, *words, "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["want"] == pytest.approx({"helpfulness": 0.8, "verbosity": -0.6})
    assert printed["weights"] == {"rsf/policy/t2": 1.0}
    assert "direction helpfulness=0.80 verbosity=-0.60 (normalised to length 1)" in done.err
    both = json.loads(call(workspace, *words, "--weights", "helpful=0.5", "--json").out)
    assert both["weights"] == {"rsf/policy/t2": 1.0, "helpful": 0.5}
    live = call(
        workspace, "generate", "--want", "verbosity=-1", "--prompts", "demo:conversations?rows=3", "--out", "a.jsonl"
    )
    assert live.code == 0, live.err
    assert "is outside the range 0.17" in live.err
    unknown = call(workspace, "chat", "--want", "honesty=1", "--prompt", "Tell me about rain.")
    assert unknown.code == 2
    assert "its objectives: helpfulness, verbosity" in unknown.err


def test_chat_changes_the_direction(made: Path) -> None:
    terminal = Terminal(made, "chat", "--want", "helpfulness=0.8,verbosity=-0.6", "--seed", "4")
    assert "helpfulness=0.80 verbosity=-0.60" in terminal.wait_for("› ")
    assert "." in terminal.say("Tell me about rain.")
    assert "helpfulness=0.60 verbosity=-0.80" in terminal.say("/want helpfulness=3,verbosity=-4")
    assert "helpfulness=0.60 verbosity=-0.80" in terminal.say("/want")
    assert "its objectives: helpfulness, verbosity" in terminal.say("/want honesty=1")
    assert "verbosity=0.00 is outside the range" in terminal.say("/want helpfulness=1")
    terminal.say("/retry")
    os.write(terminal.screen, b"/quit\n")
    assert terminal.process.wait(timeout=20) == 0


def test_compare_keeps_the_direction(made: Path, workspace: Path) -> None:
    shutil.copytree(made / "runs" / "rsf", workspace / "runs" / "rsf")
    terminal = Terminal(workspace, "chat", "--want", "helpfulness=0.8,verbosity=-0.6", "--seed", "4")
    terminal.wait_for("› ")
    terminal.say("Tell me about rain.")
    shown = terminal.say("/compare rsf/policy/t2=1 | helpful=0 | rsf/policy/t2=0")
    named, left, off = re.findall(r"\((\d+) tokens\)", shown)
    assert named == left != off
    assert "rsf/policy/t2=1 helpful=0" in terminal.say("/w")
    os.write(terminal.screen, b"/quit\n")
    assert terminal.process.wait(timeout=20) == 0


def test_samples_have_the_system_message_of_their_direction(made: Path) -> None:
    """`chat` uses the system message under which the samples were drawn."""
    policy = runs.read(made / "runs" / "rsf" / "policy" / "t2")
    ask, region = policy.manifest.method["ask"], recipe.load(recipe.builtin()["demo"], []).rsf.directions
    rows = read_table(policy.path / "samples.parquet").to_pylist()
    for row in rows:
        wanted = Want({name: row[f"want_{name}"] for name in region})
        assert math.hypot(*wanted.weights.values()) == pytest.approx(1)
        assert all(low <= wanted.weights[name] <= high for name, (low, high) in region.items())
        assert row["asked"] == wanted.system_message(ask)
    assert len({row["asked"] for row in rows}) > 3


@pytest.mark.parametrize(
    ("words", "changed", "message"),
    [
        ([], {"directions.honesty": "[0.0, 1.0]"}, "has no such objective (its objectives: helpfulness"),
        ([], {"reward": '"other"'}, "no reward model 'other'"),
        ([], {"learn": '"dpo"', "samples": "1"}, "compares two answers; set rsf.samples to 2 or more"),
        ([], {"watch": '"harmlesness"'}, "rsf.watch: runs/reward/reward has no objective 'harmlesness'"),
        ([], {"bootstrap": "7"}, "rsf.bootstrap: 7 is not a multiple of rsf.per_prompt (2); set it to 6 or 8"),
        (
            [],
            {"ask": '"be nice"'},
            "rsf.ask: the template gives 'be nice' for every direction; use {{ decimals }}",
        ),
        ([], {"directions.verbosity": "[0.5, -0.5]"}, "expected [low, high] from -1 to 1"),
        (["--endpoint", "localhost:1"], {}, "expected http://HOST:PORT"),
    ],
)
def test_unusable_rsf_settings_are_refused_early(
    words: list[str], changed: dict[str, str], message: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "runs" / "reward", tmp_path / "runs" / "reward")
    done = rsf(tmp_path, *words, **changed)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "runs" / "rsf").exists()


def test_policies_of_a_run_share_their_memory_budgets(made: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"], ['rsf.data="demo:conversations?rows=60"'])
    inputs = prepare(project, made / "runs", Screen(quiet=True), name=None, force=True, endpoint=None)
    first, second = (inputs.policies() for _ in range(2))
    first.sampler.budget.size = 7
    assert second.sampler.budget.size == 7
    assert second.judges["reward"] is first.judges["reward"]

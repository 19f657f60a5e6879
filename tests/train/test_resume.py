"""A run that was stopped, killed or damaged resumes to the same bits as a run that never stopped."""

import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_align import runs, store
from lora_align.cli import app
from lora_align.train import checkpoints
from support import COMMAND, Done, call, fill, made_once, small_disk

SFT = ['sft.data="demo:conversations?rows=120"', "sft.packing=true", "sft.batch_size=2", "sft.epochs=3"]
STAGES = {
    "dpo": (
        ["dpo", "--pref", "helpful", "--direction", "pos", "--set", "dpo.optimizer=adamw_torch", "--limit", "320"],
        Path("dpo/helpful/pos"),
    ),
    "sft": (
        ["sft", *(word for setting in SFT for word in ("--set", setting))],
        Path("sft/start"),
    ),
    "reward": (
        ["reward", "--set", 'reward.ratings.demo.data="demo:ratings?rows=240"', "--set", "reward.lora.dropout=0.1"],
        Path("reward/reward"),
    ),
}
NOISE = ["--set", "lora.dropout=0.1"]  # so that the order of chance counts, too


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)


TRAINS = re.compile(r"^\S.*  1/\d+  loss", re.MULTILINE)  # the line of the first step


def words(stage: str) -> list[str]:
    return [*STAGES[stage][0], *NOISE]


def every_step(stage: str) -> list[str]:
    return ["--set", f"{stage}.save_minutes=0"]


@pytest.fixture(scope="module", autouse=True)
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share one cache between all test processes, because a log-probability's last bits depend on its batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ALIGN_CACHE", str(made_once(tmp_path_factory, "resumed-cache", lambda folder: None)))
        yield


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def never_stopped(factory: pytest.TempPathFactory, stage: str) -> Path:
    """Return the runs folder of a run that nobody stopped."""

    def make(folder: Path) -> None:
        done = call(folder, *words(stage))
        assert done.code == 0, done.err

    return made_once(factory, f"whole-{stage}", make) / "runs"


@pytest.fixture(scope="module")
def whole(stage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a stage that nobody stopped."""
    return never_stopped(tmp_path_factory, stage) / STAGES[stage][1]


@pytest.fixture(scope="module")
def whole_dpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs folder of a `dpo` that nobody stopped."""
    return never_stopped(tmp_path_factory, "dpo")


def stopped(folder: Path, stage: str, number: int, after: int, *more: str) -> Done:
    """Start a run. Kill it once a checkpoint of step `after` exists, or send another signal once it trains."""
    out, killed = folder / "out.txt", number == signal.SIGKILL
    with out.open("w") as stream:
        child = subprocess.Popen(
            [str(COMMAND), *words(stage), *(every_step(stage) if killed else []), *more],
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        unfinished = unfinished_of(folder, stage)
        until = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < until:
            steps = [int(path.name.rpartition("-")[2]) for path in unfinished.glob("checkpoint-*")]
            if max(steps, default=0) >= after if killed else TRAINS.search(out.read_text()):
                time.sleep(random.Random(f"{stage} {after}").uniform(0, 0.2) if killed else 0)
                child.send_signal(number)
                break
            time.sleep(0.005)
        code = child.wait(60)
    return Done(code, "", out.read_text())


def unfinished_of(folder: Path, stage: str) -> Path:
    target = folder / "runs" / STAGES[stage][1]
    return target.parent / f".{target.name}.unfinished"


def same(one: Path, other: Path) -> None:
    """Check that two runs have the same adapters, bit by bit, and the same figures of every step."""
    for file in ("adapter_model.safetensors", "heads.safetensors"):
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            assert store.sha256(one / file) == store.sha256(other / file)
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    for record in (*records[0], *records[1]):
        del record["tokens_per_second"], record["seconds"]
    assert records[0] == records[1]


def test_resume_is_bit_exact_after_a_signal(stage: str, whole: Path, tmp_path: Path) -> None:
    number = signal.SIGINT if stage == "dpo" else signal.SIGTERM
    first = stopped(tmp_path, stage, number, 0)
    assert first.code == 128 + number
    assert "finishing the current step" in first.err
    assert f"to continue: lora-align {stage}" in first.err
    assert first.err.rstrip().endswith("--resume")
    refused = call(tmp_path, *words(stage))
    assert refused.code == 2
    assert "is unfinished (step" in refused.err
    assert "--resume continues it, --force starts again" in refused.err
    done = call(tmp_path, *words(stage), "--resume")
    assert done.code == 0, done.err
    assert "continues after step" in done.err
    assert not unfinished_of(tmp_path, stage).exists()
    same(whole, tmp_path / "runs" / STAGES[stage][1])
    unfinished_of(tmp_path, stage).mkdir()  # as a kill right after it was published leaves it
    again = call(tmp_path, *words(stage), "--resume")
    assert again.code == 0, again.err
    assert "is published already" in again.err
    assert not unfinished_of(tmp_path, stage).exists()
    other = call(tmp_path, *words(stage), "--resume", "--set", f"{stage}.learning_rate=1e-3")
    assert other.code == 2
    assert f"{stage}.learning_rate was" in other.err


AT_THE_LAST_STEP = """
import os, signal
from lora_align.train.stepper import StepTrainer

step = StepTrainer.training_step

def signalled(self, *given, **more):
    found = step(self, *given, **more)
    if self.state.global_step + 1 == self.state.max_steps:
        os.kill(os.getpid(), signal.SIGINT)
    return found

StepTrainer.training_step = signalled
"""
BEHIND_IT = """
import os, signal
from lora_align.train import lora_trainer

lora_trainer.draw_curve = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # all is trained and measured
"""
PROGRAM = """
from lora_align.cli import main

main()
"""


@pytest.mark.parametrize(("moment", "code"), [(AT_THE_LAST_STEP, 130), (BEHIND_IT, 143)], ids=["in it", "behind it"])
def test_a_signal_after_the_last_step_loses_nothing(
    moment: str, code: int, stage: str, whole: Path, tmp_path: Path
) -> None:
    both = ["--direction", "both"] if stage == "dpo" else []
    command = [sys.executable, "-c", moment + PROGRAM, *words(stage), *both]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert first.returncode == code, first.stderr
    assert first.stderr.rstrip().endswith("--resume")
    assert not list(tmp_path.rglob("manifest.json")), "and the other direction does not begin"
    done = call(tmp_path, *words(stage), "--resume")
    assert done.code == 0, done.err
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"continues after step {last}" in done.err
    same(whole, tmp_path / "runs" / STAGES[stage][1])


def test_recipe_sets_the_compute_dtype(
    stage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate's launcher says it
    done = call(tmp_path, *words(stage))
    assert done.code == 0, done.err
    same(whole, tmp_path / "runs" / STAGES[stage][1])


@pytest.mark.parametrize("after", [1, 8])  # `sft` is in its second epoch by then
def test_resume_is_bit_exact_after_a_kill(after: int, stage: str, whole: Path, tmp_path: Path) -> None:
    assert stopped(tmp_path, stage, signal.SIGKILL, after).code == -signal.SIGKILL
    done = call(tmp_path, *words(stage), "--resume")
    assert done.code == 0, done.err
    same(whole, tmp_path / "runs" / STAGES[stage][1])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--debug dpo --pref helpful", "--debug dpo --pref helpful --resume"),
        ("sft --set 'sft.data=my file.jsonl' --resume", "sft --set 'sft.data=my file.jsonl' --resume"),
        ("dpo --pref helpful --force", "dpo --pref helpful --force"),
        ("rsf --iterations 2 --force --resume", "rsf --iterations 2"),
        ("score --data a.jsonl --out b.jsonl --by reward", "score --data a.jsonl --out b.jsonl --by reward"),
        ("sweep helpful=0:1 --force", "sweep helpful=0:1 --force"),
        ("demo", "demo"),
    ],
)
def test_printed_line_continues_the_command(typed: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lora-align", *shlex.split(typed)])
    assert app._continuing_line(has_checkpoint=False) == f"lora-align {line}"


def test_printed_line_drops_force_once_a_checkpoint_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lora-align", "dpo", "--force", "--all"])
    assert app._continuing_line(has_checkpoint=True) == "lora-align dpo --all --resume"
    monkeypatch.setattr("sys.argv", ["lora-align", "merge", "--weights", "helpful=1"])
    assert app._continuing_line(has_checkpoint=False) == ""


def test_resume_continues_a_run_that_replaces_a_published_one(tmp_path: Path) -> None:
    """The printed line continues a run that --force began, and moves the published run aside."""
    done = call(tmp_path, *words("dpo"), "--set", "dpo.beta=1")
    assert done.code == 0, done.err
    first = stopped(tmp_path, "dpo", signal.SIGINT, 0, "--force")
    assert first.code == 130, first.err
    typed = [*words("dpo"), "--resume"]
    assert first.err.rstrip().endswith(f"to continue: lora-align {shlex.join(typed)}")
    done = call(tmp_path, *typed)
    assert done.code == 0, done.err
    assert "continues after step" in done.err
    target = tmp_path / "runs" / STAGES["dpo"][1]
    [aside] = target.parent.glob("pos.old-*")
    assert runs.read(target).manifest.recipe["dpo"]["beta"] != 1
    assert runs.read(aside).manifest.recipe["dpo"]["beta"] == 1
    again = call(tmp_path, *typed)
    assert "is published already" in again.err


@pytest.fixture
def begun(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Return a copy of a folder in which `dpo` was killed after some steps."""

    def make(folder: Path) -> None:
        assert stopped(folder, "dpo", signal.SIGKILL, 4).code == -signal.SIGKILL

    killed = made_once(tmp_path_factory, "killed-dpo", make)
    return shutil.copytree(killed, tmp_path, dirs_exist_ok=True)


def test_a_damaged_checkpoint_is_skipped(begun: Path) -> None:
    folders = sorted(unfinished_of(begun, "dpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(folders) in (2, 3)  # three, where the kill came before the oldest went
    *_, before, newest = folders
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    empty = unfinished_of(begun, "dpo") / "checkpoint-900"
    empty.mkdir()
    done = call(begun, *words("dpo"), "--resume")
    assert done.code == 0, done.err
    assert done.err.count("optimizer.pt is missing or was changed") == 1
    assert "checkpoint-900 is skipped: files.json is missing" in done.err
    assert f"continues after step {before.name[11:]}" in done.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--set", "dpo.beta=3"], "dpo.beta was 1.5, is 3.0"),
        (["--set", "lora.rank=8"], "lora.rank was 4, is 8"),
        (["--set", "preferences.helpful.margin=1"], "data changed"),
        (["--set", "base.double_quant=false"], "base.double_quant was True, is False"),
        (["--set", "base.dtype=bfloat16"], "base.dtype was auto, is bfloat16"),
        (["--set", f"base.chat_template={TEMPLATE}"], "base.chat_format changed"),
    ],
)
def test_resume_refuses_another_recipe_or_dataset(changed: list[str], message: str, begun: Path) -> None:
    done = call(begun, *words("dpo"), *changed, "--resume")
    assert done.code == 2
    assert message in done.err
    assert "--force starts again" in done.err


def test_resume_remembers_the_memory_budget(begun: Path) -> None:
    """A resumed run does not try again a batch that was too large."""
    newest = max(unfinished_of(begun, "dpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert json.loads((newest / "seen.json").read_text())["budget"] == 4096
    (newest / "seen.json").write_text(json.dumps({"tokens": 0, "budget": 300, "whole": 4096}))
    files = json.loads((newest / "files.json").read_text())
    (newest / "files.json").write_text(json.dumps({**files, "seen.json": store.sha256(newest / "seen.json")}))
    stopped(begun, "dpo", signal.SIGKILL, int(newest.name[11:]) + 2, "--resume")
    later = max(unfinished_of(begun, "dpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert later != newest
    assert json.loads((later / "seen.json").read_text())["budget"] == 300


def test_resume_accepts_changes_without_effect_on_results(begun: Path) -> None:
    done = call(begun, *words("dpo"), "--set", "dpo.tokens_per_batch=600", "--resume")
    assert done.code == 0, done.err
    done = call(begun, *words("dpo"), "--direction", "both", "--resume")
    assert done.code == 0, done.err
    assert "runs/dpo/helpful/pos is published already" in done.err
    other = call(begun, *words("dpo"), "--set", "dpo.beta=3", "--resume")
    assert other.code == 2
    assert "runs/dpo/helpful/pos was made differently: dpo.beta was 1.5, is 3.0" in other.err
    both = call(begun, *words("dpo"), "--resume", "--force")
    assert both.code == 2
    assert "give only one of them" in both.err


def test_resume_warns_of_other_library_versions(begun: Path) -> None:
    who = unfinished_of(begun, "dpo") / "identity.json"
    before = json.loads(who.read_text())
    before["versions"]["trl"] = "1.15.9"
    who.write_text(json.dumps(before))
    done = call(begun, *words("dpo"), "--resume")
    assert done.code == 0, done.err
    assert "warning: runs/dpo/helpful/pos was begun with trl 1.15.9" in done.err


def test_a_second_signal_stops_at_once_and_leaves_a_checkpoint(begun: Path) -> None:
    small_parts = [*words("dpo"), "--set", "dpo.tokens_per_batch=64", "--resume"]  # of which a step has many
    child = subprocess.Popen([str(COMMAND), *small_parts], cwd=begun, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("helpful pos  "):
            child.send_signal(signal.SIGINT)
        elif "finishing the current step" in line:
            child.send_signal(signal.SIGINT)
            break
    assert child.wait(60) == 130
    assert "stopped; no unfinished run was published" in child.stderr.read()
    done = call(begun, *words("dpo"), "--resume")
    assert done.code == 0, done.err
    assert "continues after step" in done.err
    assert "is skipped" not in done.err


@pytest.mark.parametrize("made", ["begun", "published"])
def test_a_busy_run_is_refused_and_its_writer_named(made: str, whole_dpo: Path, tmp_path: Path) -> None:
    """With and without a published run in the same place."""
    if made == "published":
        shutil.copytree(whole_dpo, tmp_path / "runs")
    child = subprocess.Popen(
        [str(COMMAND), *words("dpo"), *every_step("dpo"), "--force"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    while not list(unfinished_of(tmp_path, "dpo").glob("checkpoint-*")) and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGSTOP)  # it writes for as long as the second takes
    before = sorted(unfinished_of(tmp_path, "dpo").iterdir())
    try:
        for how in ([], ["--resume"], ["--force"]):
            second = call(tmp_path, *words("dpo"), *how)
            assert second.code == 2
            assert f"is being written by process {child.pid} on {socket.gethostname()}" in second.err
            assert sorted(unfinished_of(tmp_path, "dpo").iterdir()) == before
    finally:
        child.kill()
        child.wait(60)


def test_a_full_disk_leaves_earlier_checkpoints_unchanged(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        small = call(disk, *words("dpo"), *every_step("dpo"), "--set", "lora.rank=128")
        assert small.code == 2
        assert "MB will be written" in small.err
        child = subprocess.Popen(
            [str(COMMAND), *words("dpo"), *every_step("dpo")], cwd=disk, stderr=subprocess.PIPE, text=True
        )
        while not list(unfinished_of(disk, "dpo").glob("checkpoint-2")) and child.poll() is None:
            time.sleep(0.005)
        fill(disk)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "No space left" in errors
        reason = r"could not be written \(.*No space left.*\) after [\d.,]+ of about [\d.,]+ MB"
        assert re.search(reason, errors), errors
        assert "--resume continues from the checkpoint of step" in errors
        (disk / "filler").unlink()
        done = call(disk, *words("dpo"), "--resume")
        assert done.code == 0, done.err


def test_a_new_recipe_key_is_a_difference_only_if_set() -> None:
    assert not list(checkpoints.differences({"sft": {"data": "x"}}, {"sft": {"data": "x", "subset": ""}}))
    assert list(checkpoints.differences({"sft": {}}, {"sft": {"subset": "a"}})) == ["sft.subset was None, is a"]
    assert list(checkpoints.differences({"sft": {"limit": None}}, {"sft": {"limit": 0}}))

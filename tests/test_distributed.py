"""Two processes train like one: same steps, one output, one run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_align import runs
from support import call, made_once

TORCHRUN = Path(sys.executable).with_name("torchrun")
ACCELERATE = Path(sys.executable).with_name("accelerate")
REWARD = ["reward", "--set", 'reward.ratings.demo.data="demo:ratings?rows=60"']
ADAM = ["--set", "dpo.optimizer=adamw_torch", "--set", "dpo.learning_rate=1e-2"]
STAGES = {  # each last step has fewer rows than the others; that of reward has 1 row for 2 processes
    "dpo": ["dpo", "--pref", "helpful", "--direction", "pos", "--limit", "44", *ADAM],
    "sft": ["sft", "--set", 'sft.data="demo:conversations?rows=40"', "--set", "sft.batch_size=6"],
    "reward": [*REWARD, "--set", "reward.batch_size=4", "--set", "reward.limit=49"],
    "rsf": [
        *["rsf", "--iterations", "1", "--set", 'rsf.data="demo:conversations?rows=40"', "--set", "rsf.per_prompt=1"],
        *["--set", "rsf.samples=2", "--set", "rsf.bootstrap=4", "--set", "rsf.epochs=1", *REWARD[1:]],
    ],
}


def launched(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    launcher = launcher or (str(TORCHRUN), "--standalone", "--nproc-per-node", "2")
    return subprocess.Popen(
        [*launcher, "-m", "lora_align", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all stages in one process."""

    def make(folder: Path) -> None:
        for words in STAGES.values():
            done = call(folder, *words)
            assert done.code == 0, done.err

    return made_once(tmp_path_factory, "one-process", make)


def records(run: Path) -> list[dict[str, float]]:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in steps:
        del record["tokens_per_second"], record["seconds"]
        if abs(record.get("margin", 1.0)) < 1e-4:  # before any training, the accuracy is the sign of rounding errors
            del record["accuracy"]
    return steps


DIVIDED = ("--set", "base.fsdp=true")
CONFIGURATION = Path(__file__).parent.parent / "recipes" / "several-cards.yaml"
BY_ACCELERATE = (str(ACCELERATE), "launch", "--config_file", str(CONFIGURATION), "--main_process_port", "0")
WAYS = {
    **{stage: (stage, ()) for stage in STAGES},
    "dpo, divided": ("dpo", DIVIDED),
    "sft, divided": ("sft", (*DIVIDED, "--set", "sft.gradient_checkpointing=true")),
    "reward, divided": ("reward", (*DIVIDED, "--set", "reward.tokens_per_batch=200")),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_take_the_same_steps_as_one(way: str, one: Path, tmp_path: Path) -> None:
    stage, more = WAYS[way]
    if stage == "rsf":
        shutil.copytree(one / "runs" / "reward", tmp_path / "runs" / "reward")
    two = launched(tmp_path, *STAGES[stage], *more, launcher=BY_ACCELERATE if way == "dpo" else ())
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    made = [run.path.relative_to(one / "runs") for run in runs.list_runs(one / "runs") if run.manifest.stage == stage]
    assert made
    for path in made:
        ours, theirs = one / "runs" / path, tmp_path / "runs" / path
        runs.read(theirs).check_files()
        names = [{file.name for file in folder.iterdir()} - {runs.LOG} for folder in (ours, theirs)]
        assert names[0] == names[1]
        expected, actual = records(ours), records(theirs)
        tokens = [[record.pop("tokens") for record in some] for some in (expected, actual)]
        assert tokens[1] == tokens[0]
        for before, now in zip(expected, actual, strict=True):
            assert now == pytest.approx(before, rel=1e-3, abs=1e-5)
        lines = (theirs / "metrics.jsonl").read_text().count("\n")
        assert lines == len(expected), "each step is recorded once"
    assert out.count(str(Path("runs") / made[-1])) == 1, "only rank 0 prints"
    assert not list((tmp_path / "runs").rglob(".*.staging"))


@pytest.mark.parametrize("more", [(), DIVIDED], ids=["whole", "divided"])
def test_run_of_two_processes_resumes_in_one(more: tuple[str, ...], one: Path, tmp_path: Path) -> None:
    words = [*STAGES["dpo"], "--set", "dpo.save_minutes=0"]
    two = launched(tmp_path, *words, *more)
    checkpoints = tmp_path / "runs" / "dpo" / "helpful" / ".pos.unfinished"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")):
        assert time.monotonic() < until
        assert two.poll() is None
        time.sleep(0.01)
    two.send_signal(signal.SIGINT)
    _, err = two.communicate(timeout=120)
    assert err.count("finishing the current step") == 1
    assert err.count("error: stopped") == 1
    done = call(tmp_path, *words, "--resume")
    assert done.code == 0, done.err
    assert "continues after step" in done.err
    run = Path("runs") / "dpo" / "helpful" / "pos"
    for before, now in zip(records(one / run), records(tmp_path / run), strict=True):
        if more:  # with FSDP, the two answers to a prompt are separate rows, which takes more tokens
            before["tokens"] = now["tokens"]
        assert now == pytest.approx(before, rel=1e-3, abs=1e-5)


def test_failed_step_ends_both_processes_with_one_error(tmp_path: Path) -> None:
    wild = ["dpo.learning_rate=1e3", "dpo.weight_decay=10", "dpo.max_grad_norm=1e9", "dpo.warmup=0", "dpo.batch_size=8"]
    two = launched(tmp_path, *STAGES["dpo"], *(word for value in wild for word in ("--set", value)))
    _, err = two.communicate(timeout=120)
    assert two.returncode
    assert err.count("error: step") == 1
    assert "is not finite" in err
    assert not list((tmp_path / "runs" / "dpo").rglob("manifest.json"))


def test_errors_are_printed_once_under_accelerate(tmp_path: Path) -> None:
    for words, message in (
        (("list",), "error: list runs in one process, but 2 were launched"),
        (("dpo", "--pref", "helpfull"), "error: no preference 'helpfull' in the recipe, did you mean 'helpful'?"),
    ):
        two = launched(tmp_path, *words, launcher=BY_ACCELERATE)
        _, err = two.communicate(timeout=120)
        assert two.returncode
        assert err.count(message) == 1, err


def test_fsdp_is_refused_for_rsf_and_unquantised_bases(tmp_path: Path) -> None:
    two = launched(tmp_path, "rsf", *DIVIDED)
    _, err = two.communicate(timeout=120)
    assert two.returncode
    assert err.count("error: base.fsdp: rsf cannot sample from a sharded base") == 1, err
    done = call(tmp_path, "dpo", "--all", *DIVIDED, "--set", "base.quantization=none")
    assert done.code == 2
    assert "base.fsdp shards 4-bit weights, but base.quantization is 'none'" in done.err


@pytest.mark.parametrize("divides", ["FSDP", "DEEPSPEED"])
def test_fsdp_and_deepspeed_of_accelerate_are_refused(
    divides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{divides}", "true")
    done = call(tmp_path, "dpo", "--all")
    assert done.code == 2
    assert f"accelerate is configured for {divides}" in done.err
    assert "--set base.fsdp=true" in done.err

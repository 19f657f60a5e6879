"""A run sends nothing to trackers by default, and every step's figures to those of `report_to`."""

import os
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_align import recipe, runs
from lora_align.errors import UserError
from lora_align.train import lora_trainer
from support import COMMAND, Cli, call


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    words = ["dpo", "--pref", "helpful", "--direction", "pos", "--limit", "64"]
    done = call(tmp_path, *words, "--set", 'dpo.report_to=["tensorboard"]')
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "dpo" / "helpful" / "pos"
    events = EventAccumulator(str(run.with_name("pos.tensorboard"))).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, int(runs.read(run).manifest.metrics["steps"]) + 1))
    assert {"train/margin", "train/accuracy", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert [run.path for run in runs.list_runs(tmp_path / "runs")] == [run]
    runs.read(run).check_files()


@pytest.mark.parametrize(("tracker", "pattern"), [("wandb", "*.wandb"), ("trackio", "*.db"), ("mlflow", "*.db")])
def test_installed_trackers_get_the_figures(tracker: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    words = [
        *("dpo", "--pref", "helpful", "--direction", "pos", "--limit", "64"),
        "--set",
        f'dpo.report_to=["{tracker}"]',
    ]
    here = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([COMMAND, *words], cwd=tmp_path, env={**os.environ, **here}, capture_output=True, check=True)
    [file] = tmp_path.rglob(pattern)
    assert b"margin" in file.read_bytes()


def test_no_tracker_is_used_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    done = call(tmp_path, "dpo", "--pref", "helpful", "--direction", "pos", "--limit", "32")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "runs" / "dpo" / "helpful").glob("[!.]*")) == ["pos"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_missing_tracker_is_refused_before_reading_data(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the recipe cannot be trained: .*no-such-tracker"):
        lora_trainer.check_trackers(recipe.Dpo(report_to=("no-such-tracker",)))
    done = cli("dpo", "--pref", "helpful", "--set", 'dpo.report_to=["comet_ml"]')
    assert done.code == 2
    assert "comet" in done.err
    assert "rows to train on" not in done.err
    assert not list(tmp_path.glob("runs/**/*"))


def test_an_optimizer_without_its_library_is_refused_early() -> None:
    project = recipe.load(recipe.builtin()["demo"], ["dpo.optimizer=galore_adamw"])
    with pytest.raises(UserError, match=r"dpo.optimizer: 'galore_adamw' needs the library galore_torch; install it"):
        project.check_trains("dpo")

"""The recipe of a command without --recipe."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lora_align import recipe, runs
from lora_align.cli.recipe_choice import recipe_of_runs, recipe_to_train
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.runs import Manifest

BASE = {"model": "demo", "fingerprint": "0"}


def publish(folder: Path, name: str, stage: str, used: recipe.Recipe) -> None:
    target = folder / name
    target.mkdir(parents=True)
    made = len(list(folder.rglob(runs.MANIFEST)))
    manifest = Manifest(stage=stage, base=BASE, recipe=used.as_dict(), created=f"2026-01-01T00:00:0{made}")
    (target / runs.MANIFEST).write_text(json.dumps(asdict(replace(manifest, digest=runs.digest(asdict(manifest))))))


def demo(*overrides: str) -> recipe.Recipe:
    return recipe.load(recipe.builtin()["demo"], overrides)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_overrides_of_a_measurement_are_not_inherited(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(folder, "dpo", "dpo", demo("dpo.limit=64"))
    publish(folder, "sweep", "sweep", demo("dpo.limit=64", "eval.count=24"))
    publish(folder, "mix", "mix", demo("eval.samples=9"))
    project = recipe_of_runs(None, (), Screen(), folder)
    assert (project.dpo.limit, project.eval) == (64, demo().eval)
    assert capsys.readouterr().err == f"recipe: the one stored in {folder}/dpo, changed from demo: dpo.limit=64\n"


def test_overrides_of_training_are_inherited_and_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(folder, "dpo", "dpo", demo("eval.count=24", "lora.rank=8"))
    project = recipe_of_runs(None, ["eval.samples=2"], Screen(), folder)
    assert (project.eval.count, project.eval.samples, project.lora.rank) == (demo().eval.count, 2, 8)
    assert "/dpo, changed from demo: lora.rank=8\n" in capsys.readouterr().err


def test_many_changes_of_a_stored_recipe_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"rsf.{name}=7" for name in ("prompts", "per_prompt", "samples", "bootstrap", "iterations", "epochs")]
    publish(folder, "dpo", "dpo", demo(*rows, "dpo.limit=64", 'rsf.columns={ prompt = "question" }'))
    recipe_of_runs(None, (), Screen(), folder)
    line = capsys.readouterr().err
    assert line.count("=") == 6
    assert line.endswith(", and 2 more\n")
    assert "not set" not in line


def test_stored_recipe_without_its_file_is_compared_with_defaults(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder.with_name("mine.toml")
    file.write_text('[base]\nmodel = "demo"\n[dpo]\nbeta = 0.3\n')
    publish(folder, "dpo", "dpo", recipe.load(file))
    recipe_of_runs(None, (), Screen(), folder)
    assert "/dpo\n" in capsys.readouterr().err
    file.write_text('[base]\nmodel = "demo"\n[dpo]\nbeta = 0.2\n')
    recipe_of_runs(None, (), Screen(), folder)
    assert f"/dpo, changed from {file}: dpo.beta=0.3\n" in capsys.readouterr().err
    file.unlink()
    recipe_of_runs(None, (), Screen(), folder)
    assert "/dpo, changed from the defaults: dpo.beta=0.3\n" in capsys.readouterr().err


def test_folder_of_mixes_uses_the_recipe_of_the_newest_mix(folder: Path) -> None:
    publish(folder, "mix", "mix", demo("lora.rank=8"))
    publish(folder, "sweep", "sweep", demo("lora.rank=2"))
    assert recipe_of_runs(None, (), Screen(quiet=True), folder).lora.rank == 8


def test_training_uses_the_newest_recipe_without_overrides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.with_name("mine.toml")
    file.write_text('[base]\nmodel = "demo"\n[dpo]\nbeta = 0.3\n')
    publish(folder, "dpo", "dpo", recipe.load(file, ["dpo.limit=64"]))
    project = recipe_to_train(None, (), Screen(), folder)
    assert (project.dpo.beta, project.dpo.limit) == (0.3, None)
    assert f"recipe: {file}, as for {folder}/dpo\n" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(UserError, match=r"was trained with .*mine.toml, which does not exist; choose a recipe"):
        recipe_to_train(None, (), Screen(), folder)

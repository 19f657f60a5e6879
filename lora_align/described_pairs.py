"""The pairs that `lora-align pairs` made from a described preference: where they are, and whether they are current."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_align import runs, store
from lora_align.errors import UserError
from lora_align.recipe import Recipe, flat

STAGE = "pairs"
FILE = "pairs.jsonl"


def folder(name: str, runs_dir: Path) -> Path:
    """Return the folder in which `pairs` publishes a preference's pairs."""
    return runs_dir / STAGE / name


def settings(recipe: Recipe, name: str) -> Mapping[str, Any]:
    """Return what decides which pairs are made, as plain data: the preference's table, its prompts, and [pairs]."""
    table = replace(recipe.preference(name), data="", rank="label", margin=0.0, labels={})  # not read by `pairs`
    plain: dict[str, Any] = json.loads(json.dumps({"preference": asdict(table), STAGE: asdict(recipe.pairs)}))
    prompts = Path(table.prompts).expanduser()
    return {**plain, "hash of the prompts": store.sha256(prompts) if table.prompts and prompts.is_file() else ""}


def attach(recipe: Recipe, runs_dir: Path) -> Recipe:
    """Return the recipe with the file of its pairs as the `data` of each described preference that has pairs."""
    described = [name for name, table in recipe.preferences.items() if table.described]
    files = {name: folder(name, runs_dir) / FILE for name in described if runs.is_run(folder(name, runs_dir))}
    tables = {name: replace(recipe.preferences[name], data=str(file)) for name, file in files.items()}
    return replace(recipe, preferences={**recipe.preferences, **tables})


def missing(recipe: Recipe, names: Iterable[str], runs_dir: Path) -> list[str]:
    """Return the described preferences among `names` that have no pairs; refuse pairs of an earlier description."""
    parts = [part for name in names for part in recipe.preference(name).of or (name,)]
    described = [part for part in dict.fromkeys(parts) if recipe.preferences[part].described]
    made = [name for name in described if runs.is_run(folder(name, runs_dir))]
    for name in made:
        refuse_outdated(recipe, name, runs_dir)
    return [name for name in described if name not in made]


def refuse_outdated(recipe: Recipe, name: str, runs_dir: Path) -> None:
    """Refuse pairs that were made with other settings than those of the recipe."""
    if fault := _outdated(recipe, name, runs_dir):
        raise UserError(fault)


def warnings(recipe: Recipe, runs_dir: Path) -> list[str]:
    """Return a warning for each described preference whose pairs are of other settings."""
    described = [name for name, table in recipe.preferences.items() if table.described]
    made = [name for name in described if runs.is_run(folder(name, runs_dir))]
    return [fault for name in made if (fault := _outdated(recipe, name, runs_dir))]


def _outdated(recipe: Recipe, name: str, runs_dir: Path) -> str:
    run = runs.read(folder(name, runs_dir))
    now, then = dict(flat(settings(recipe, name))), dict(flat(run.manifest.method["settings"]))
    changed = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    command = runs.command(f"pairs --pref {name} --force", runs_dir)
    return (
        f"{run.path} was made with other settings ({', '.join(changed)}); `{command}` makes new pairs"
        if changed
        else ""
    )

"""Options that several commands take, and what they come to."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lora_align import recipe as recipes
from lora_align import runs
from lora_align.console import Screen
from lora_align.data import sources
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.recipe import Recipe
from lora_align.weights import NAME

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME|FILE", envvar="LORA_ALIGN_RECIPE", help="A built-in recipe, or a .toml file."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value, as in dpo.beta=0.05.")
]
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", envvar="LORA_ALIGN_RUNS", help="The folder of runs.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings stay.")]
NameOption = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Publish under this name.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Move an existing run aside.")]
DRAWN = (".png", ".pdf", ".svg")
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue what was stopped.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show recipe, lengths and plan; train nothing.")]
LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Train on the first N rows only.")]


def project_of(name: str | None, overrides: list[str] | None, screen: Screen, runs_dir: Path | None = None) -> Recipe:
    """Return the recipe that is named; for commands that work on runs, otherwise that of the newest training run.

    What a measurement was made with stays with it: of a folder without training runs, the newest mix's recipe counts.
    A stored recipe holds what was set while it was trained, for [eval] too; whatever differs from its file is printed.
    """
    if name is None and runs_dir is not None and not recipes.LOCAL.exists():
        made = [run for run in runs.every(runs_dir) if run.manifest.recipe]
        trained = [run for run in made if run.manifest.stage in runs.TRAINING]
        if kept := trained or [run for run in made if run.manifest.stage == "mix"]:
            source, table = f"{kept[-1].path}/{runs.MANIFEST}", json.dumps(kept[-1].manifest.recipe)
            beside = recipes.unlike_its_source(recipes.from_dict(json.loads(table), source))
            screen.note(f"recipe: the one kept in {kept[-1].path}{beside}")
            return recipes.from_dict(json.loads(table), source, overrides or [])
    path, why = recipes.find(name)
    if why:
        screen.note(why)
    return recipes.load(path, overrides or [])


def either(force: bool, resume: bool) -> None:
    """Refuse to be told two things at once."""
    if force and resume:
        raise UserError("--resume goes on with what was begun, --force begins anew: one or the other")


def drawable(picture: Path | None) -> None:
    """Refuse a picture that cannot be written; asked before anything slow begins."""
    if picture is not None and not picture.resolve().parent.is_dir():
        raise UserError(f"--picture {picture}: no such folder")
    if picture is not None and picture.suffix not in DRAWN:
        raise UserError(f"--picture {picture}: a name that ends in {' or '.join(DRAWN)}")


def planned(project: Recipe, stage: str, screen: Screen, passes: int | None = None) -> None:
    """What a stage would do, in place of doing it."""
    screen.loading(project.base.model)
    from lora_align.plan import planner

    found = planner.plan_stages(project, [stage], screen, passes=passes)
    parts = [planner.resolved(project, stage), planner.summary(found, lengths=True)]
    screen.result("\n\n".join(parts), {"recipe": project.as_dict(), **found})


def trained(names: Iterable[str], runs_dir: Path, project: Recipe) -> None:
    """Refuse names that no preference, run or folder has; asked before anything heavy is imported."""
    for name in names:
        vectors.find(name, runs_dir, project.preferences)


def readable(data: str) -> None:
    """Refuse a file that is not there, or whose first row is none; asked before anything heavy is imported."""
    if Path(data).suffix:
        next(sources.good_rows(data), None)


def limited(overrides: list[str] | None, stage: str, limit: int | None) -> list[str]:
    """`--limit N` is short for `--set STAGE.limit=N`."""
    return [*(overrides or []), *([f"{stage}.limit={limit}"] if limit else [])]


def checked(name: str | None) -> str | None:
    """A run's name, if it can be one."""
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: 1 to 64 of a-z 0-9 _ - , starting with a letter or digit")
    return name

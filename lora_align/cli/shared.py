"""Options that several commands share: declared once, added to a command by `takes`, and handed over as `Given`."""

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_align import recipe as recipes
from lora_align import runs
from lora_align.console import Screen
from lora_align.data import sources
from lora_align.errors import UserError
from lora_align.policy import judge_runs, vectors
from lora_align.recipe import Recipe
from lora_align.weights import NAME, parse_weights

PICTURES = (".png", ".pdf", ".svg")
OPTIONS: dict[str, tuple[Any, Any]] = {  # each with its annotation and default, in the order of --help
    "recipe": (
        Annotated[
            str | None,
            typer.Option(
                "--recipe", metavar="NAME|FILE", envvar="LORA_ALIGN_RECIPE", help="A built-in recipe, or a .toml file."
            ),
        ],
        None,
    ),
    "overrides": (
        Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value, as in dpo.beta=0.05."),
        ],
        None,
    ),
    "runs_dir": (
        Annotated[Path, typer.Option("--runs", metavar="DIR", envvar="LORA_ALIGN_RUNS", help="The folder of runs.")],
        runs.DEFAULT,
    ),
    "name": (Annotated[str | None, typer.Option("--name", metavar="NAME", help="Publish under this name.")], None),
    "force": (Annotated[bool, typer.Option("--force", help="Move an existing run aside.")], False),
    "resume": (Annotated[bool, typer.Option("--resume", help="Continue what was stopped.")], False),
    "limit": (
        Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Train on the first N rows only.")],
        None,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Show recipe, lengths and plan; train nothing.")],
        False,
    ),
    "as_json": (Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")], False),
    "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings stay.")], False),
}

RECIPE, MEASURES, TRAINS = (
    ("recipe", "overrides"),
    ("recipe", "overrides", "runs_dir"),
    ("recipe", "overrides", "runs_dir", "force", "resume", "limit", "dry_run"),
)
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME=WEIGHT,…",
        help="Preferences, runs or folders, as in helpful=1,harmless=-0.5.",
    ),
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="Any PEFT LoRA folder.")]
WantOption = Annotated[
    str | None,
    typer.Option(
        "--want",
        metavar="NAME=WEIGHT,…",
        help="A direction for the policy of `rsf`, as in helpfulness=0.8,verbosity=-0.6.",
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(metavar="SHARE", min=0.01, max=1.0, help="Sample from the likeliest tokens of this probability."),
]
LengthOption = Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")]
ByOption = Annotated[
    list[str] | None,
    typer.Option("--by", metavar="JUDGE", help="A reward model, or pair:PREFERENCE for its two adapters. Repeatable."),
]
SEEDS = {"min": 0, "max": 2**63 - 1}


@dataclass(frozen=True)
class Given:
    """What the shared options of one command came to."""

    recipe: str | None = None
    overrides: list[str] | None = None
    runs_dir: Path = runs.DEFAULT
    name: str | None = None
    force: bool = False
    resume: bool = False
    limit: int | None = None
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    screen: Screen = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "screen", Screen(self.as_json, self.quiet))
        if self.name is not None and not NAME.fullmatch(self.name):
            raise UserError(f"--name {self.name!r}: 1 to 64 of a-z 0-9 _ - , starting with a letter or digit")
        if self.force and self.resume:
            raise UserError("--resume continues a run, --force starts it again: give one of them")

    def of_recipe(self) -> Recipe:
        """Return the recipe that is named, or found in this folder."""
        return recipe_of(recipe_trained_with(self.recipe, self.runs_dir, self.screen), self.overrides, self.screen)

    def to_train(self, stage: str, *more: str) -> Recipe:
        """Return the recipe of a training stage; `--limit N` is short for `--set STAGE.limit=N`."""
        limit = [f"{stage}.limit={self.limit}"] if self.limit else []
        name = recipe_trained_with(self.recipe, self.runs_dir, self.screen)
        return recipe_of(name, [*(self.overrides or []), *limit, *more], self.screen)

    def of_runs(self) -> Recipe:
        """Return the recipe of a command that works on runs: without --recipe, that of the newest training run."""
        return recipe_of(self.recipe, self.overrides, self.screen, self.runs_dir)

    def refuse_existing(self, target: Path, keep_both: str = "--name NEW keeps both") -> None:
        """Refuse a run that is being written, or that exists and is neither resumed nor moved aside."""
        runs.refuse_busy(target)
        if not self.resume:
            runs.refuse_existing(target, self.force, keep_both)

    def check_vectors(self, names: Iterable[str], project: Recipe) -> None:
        """Refuse names that no preference, run or folder has."""
        for name in names:
            vectors.find(name, self.runs_dir, project.preferences)

    def check_judges(self, names: Iterable[str] | None, project: Recipe) -> None:
        """Refuse names that no judge has."""
        for name in names or ():
            judge_runs.check(name, project, self.runs_dir)


def takes(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command, whose first parameter is then `given`; every command has --json and --quiet."""
    wanted = [name for name in OPTIONS if name in (*names, "as_json", "quiet")]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command).parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(name, kind, annotation=annotation, default=defaults.get(name, default))
            for name, (annotation, default) in OPTIONS.items()
            if name in wanted
        ]

        @wraps(command)
        def called(**values: Any) -> None:
            given = Given(**{name: values.pop(name) for name in wanted})
            command(given, **values)

        parameters = [*(parameter.replace(kind=kind) for parameter in own), *shared]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_options


def recipe_of(name: str | None, overrides: list[str] | None, screen: Screen, runs_dir: Path | None = None) -> Recipe:
    """Return the recipe that is named; for commands that work on runs, otherwise that of the newest training run.

    What a measurement was made with stays with it: of a folder without training runs, the newest mix's recipe counts.
    A stored recipe holds what was set while it was trained, for [eval] too; whatever differs from its file is printed.
    """
    if name is None and runs_dir is not None and not recipes.LOCAL.exists():
        made = [run for run in runs.list_runs(runs_dir) if run.manifest.recipe]
        trained = [run for run in made if run.manifest.stage in runs.TRAINING]
        if stored := trained or [run for run in made if run.manifest.stage == "mix"]:
            source, table = f"{stored[-1].path}/{runs.MANIFEST}", json.dumps(stored[-1].manifest.recipe)
            beside = recipes.changes_from_source(recipes.from_dict(json.loads(table), source))
            screen.note(f"recipe: the one stored in {stored[-1].path}{beside}")
            return recipes.from_dict(json.loads(table), source, overrides or [])
    path, why = recipes.find(name)
    if why:
        screen.note(why)
    return recipes.load(path, overrides or [])


def recipe_trained_with(name: str | None, runs_dir: Path, screen: Screen) -> str | None:
    """Return the recipe that is named, or else that of the newest training run, without its overrides."""
    trained = [] if name or recipes.LOCAL.exists() else runs.list_runs(runs_dir)
    trained = [run for run in trained if run.manifest.stage in runs.TRAINING]
    source = trained[-1].manifest.recipe.get("source", "") if trained else ""
    if source in ("", recipes.DEFAULT):
        return name
    if not Path(source).is_file() and source not in recipes.builtin():
        raise UserError(
            f"{trained[-1].path} was trained with {source}, which is not here; name a recipe: --recipe FILE"
        )
    screen.note(f"recipe: {source}, which {trained[-1].path} was trained with")
    return str(source)


def weights_of(text: str | None) -> dict[str, float] | None:
    """Read an option with weights, if it is given."""
    return parse_weights(text) if text is not None else None


def check_picture(picture: Path | None) -> None:
    """Refuse a picture that cannot be written."""
    if picture is not None and not picture.resolve().parent.is_dir():
        raise UserError(f"--picture {picture}: no such folder")
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"--picture {picture}: a name that ends in {' or '.join(PICTURES)}")


def check_text(option: str, text: str | None) -> None:
    """Refuse text that is no UTF-8: a shell hands over such bytes as half characters."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"{option}: the text is not UTF-8") from None


def check_url(option: str, address: str | None) -> None:
    """Refuse an address that is no URL of a server."""
    if address is not None and not address.startswith(("http://", "https://")):
        raise UserError(f"{option} {address!r}: expected http://HOST:PORT or https://…")


def check_first_row(data: str) -> None:
    """Refuse a file that is missing, or whose first row cannot be read."""
    if Path(data).suffix:
        next(sources.rows_or_raise(data), None)


def show_plan(project: Recipe, stage: str, screen: Screen, passes: int | None = None) -> None:
    """Show what a stage would do, for --dry-run."""
    screen.loading(project.base.model)
    from lora_align.plan import planner

    found = planner.plan_stages(project, [stage], screen, passes=passes)
    parts = [planner.resolved(project, stage), planner.summary(found, lengths=True)]
    screen.result("\n\n".join(parts), {"recipe": project.as_dict(), **found})


def run_facts(run: runs.Run) -> dict[str, Any]:
    """Return a run as JSON has it."""
    manifest = run.manifest
    return {
        "path": str(run.path),
        "stage": manifest.stage,
        "preference": manifest.preference,
        "direction": manifest.direction,
        "created": manifest.created,
        "base": manifest.base.get("model"),
        "contains_start": manifest.contains_start,
        "parents": manifest.parents,
        "metrics": manifest.metrics,
        "unconverged": manifest.unconverged,
    }

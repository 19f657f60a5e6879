"""Options that several commands share, declared once, and checks of options."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from lora_align import described_pairs, run_writer, runs
from lora_align.cli import recipe_choice
from lora_align.console import Screen
from lora_align.data import sources
from lora_align.errors import UserError
from lora_align.mix_weights import NAME, NAME_RULE, RESERVED
from lora_align.policy import judge_runs, vectors
from lora_align.recipe import Recipe

PICTURES = (".png", ".pdf", ".svg")


def _option(kind: Any, default: Any, *names: str, **settings: Any) -> tuple[Any, Any]:
    """Return the annotation and the default of a parameter that is an option."""
    return Annotated[kind, typer.Option(*names, **settings)], default


OPTIONS = {  # parameter name → annotation and default, in the order of --help
    "recipe": _option(
        str | None,
        None,
        "--recipe",
        metavar="NAME|FILE",
        envvar="LORA_ALIGN_RECIPE",
        help="A built-in recipe or a .toml file; by default ./lora-align.toml, else the newest run's, else demo.",
    ),
    "overrides": _option(
        list[str] | None,
        None,
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, as in dpo.beta=0.05; repeatable.",
    ),
    "runs_dir": _option(
        Path, runs.DEFAULT, "--runs", metavar="DIR", envvar="LORA_ALIGN_RUNS", help="The folder of all runs."
    ),
    "name": _option(
        str | None, None, "--name", metavar="NAME", help="Save the run under this name instead of the default one."
    ),
    "force": _option(bool, False, "--force", help="Repeat the run, and move an existing one aside."),
    "resume": _option(bool, False, "--resume", help="Continue a run that was stopped."),
    "limit": _option(
        int | None,
        None,
        "--limit",
        metavar="N",
        min=1,
        help="Use at most N training rows of each source (pairs in data and dpo, prompts in rsf).",
    ),
    "dry_run": _option(
        bool, False, "--dry-run", help="Print the recipe, the lengths of rows and the plan; train nothing."
    ),
    "as_json": _option(bool, False, "--json", help="Print the result as one JSON object."),
    "quiet": _option(bool, False, "--quiet", "-q", help="Print no progress and no notes."),
}
RECIPE = ("recipe", "overrides")
RUNS = (*RECIPE, "runs_dir")
TRAINING = (*RUNS, "force", "resume", "limit", "dry_run")
RESUME_OR_FORCE = "--resume continues a run, --force starts it again: give only one of them"
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME=WEIGHT,…",
        help="Weights of preferences, runs or folders, as in helpful=1,harmless=-0.5; by default the newest mix.",
    ),
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="One PEFT LoRA folder, instead of weights.")
]
WantOption = Annotated[
    str | None,
    typer.Option(
        "--want",
        metavar="NAME=WEIGHT,…",
        help="A direction for the newest policy of `rsf`, as in helpfulness=0.8,verbosity=-0.6.",
    ),
]
SystemOption = Annotated[str, typer.Option("--system", metavar="TEXT", help="A system message before every prompt.")]
TemperatureOption = Annotated[
    float, typer.Option(metavar="NUMBER", min=0.0, help="The sampling temperature; 0 takes the most likely token.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0.01,
        max=1.0,
        help="Sample from the most likely tokens up to this total probability (top-p).",
    ),
]
LengthOption = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer in tokens.")]
ByOption = Annotated[
    list[str] | None,
    typer.Option(
        "--by",
        metavar="JUDGE",
        help="The judge: a reward model's name, or pair:PREFERENCE for a preference's two adapters; repeatable.",
    ),
]
ServedModelOption = Annotated[
    str,
    typer.Option("--model", metavar="NAME", help="The name of the model on the server; needed if it serves several."),
]
SEED_RANGE = {"min": 0, "max": 2**63 - 1}


class Result(Protocol):
    """The result of a command."""

    def summary(self) -> str:
        """Return text for the screen."""

    def as_json(self) -> Mapping[str, Any]:
        """Return plain data for --json."""


@dataclass(frozen=True)
class Given:
    """The values of a command's shared options."""

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
            raise UserError(f"--name {self.name!r}: expected {NAME_RULE}")
        if self.name in RESERVED:
            raise UserError(f"--name {self.name}: this word names a policy; choose another name")
        if self.force and self.resume:
            raise UserError(RESUME_OR_FORCE)

    def recipe_to_train(self, stage: str = "", *overrides: str) -> Recipe:
        """Return the recipe of a command that trains or plans; --limit is short for `--set STAGE.limit`."""
        limit = [f"{stage}.limit={self.limit}"] if self.limit else []
        overrides = (*(self.overrides or []), *limit, *overrides)
        recipe = recipe_choice.recipe_to_train(self.recipe, overrides, self.screen, self.runs_dir)
        return described_pairs.attach(recipe, self.runs_dir)

    def recipe_of_runs(self) -> Recipe:
        """Return the recipe of a command that uses runs."""
        recipe = recipe_choice.recipe_of_runs(self.recipe, self.overrides or (), self.screen, self.runs_dir)
        for warning in described_pairs.warnings(recipe, self.runs_dir):
            self.screen.warn(warning)
        return described_pairs.attach(recipe, self.runs_dir)

    def show(self, result: Result) -> None:
        """Print a result: its summary, or with --json its data."""
        self.screen.result(result.summary(), result.as_json())

    def refuse_existing(self, target: Path, remedy: str = "--name NEW keeps both") -> None:
        """Refuse a run that is being written, or that exists without --resume or --force."""
        run_writer.refuse_before_training(target, force=self.force, resume=self.resume, remedy=remedy)

    def check_vectors(self, names: Iterable[str], recipe: Recipe) -> None:
        """Refuse a name that is not a trained preference, a run or an adapter folder."""
        for name in names:
            vectors.find(name, self.runs_dir, recipe.preferences)

    def check_pairs(self, recipe: Recipe, preferences: Iterable[str]) -> None:
        """Refuse a preference that the recipe does not have, or whose data file is missing."""
        for preference in preferences:
            for part in recipe.parts(preference):
                sources.refuse_missing(part.data)

    def check_judges(self, names: Iterable[str] | None, recipe: Recipe) -> None:
        """Refuse a name that is not a judge."""
        for name in names or ():
            judge_runs.check(name, recipe, self.runs_dir)


def takes(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command, and --json and --quiet. Its first parameter, `given`, has their values.

    `defaults` replace defaults of OPTIONS.
    """
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


def check_picture(picture: Path | None) -> None:
    """Refuse a picture that cannot be written."""
    if picture is not None and not picture.resolve().parent.is_dir():
        raise UserError(f"--picture {picture}: there is no folder {picture.parent}; make it first")
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"--picture {picture}: expected a file name that ends in .png, .pdf or .svg")


def check_text(option: str, text: str | None) -> None:
    """Refuse text that is not UTF-8; Python represents such bytes of the command line by lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"{option}: the text is not UTF-8; check the encoding of your terminal or script") from None


def check_url(option: str, address: str | None) -> None:
    """Refuse an address that is not an http or https URL."""
    if address is not None and not address.startswith(("http://", "https://")):
        raise UserError(f"{option} {address!r}: expected http://HOST:PORT or https://…")


def check_first_row(data: str) -> None:
    """Refuse a file that is missing or whose first row is not readable. A name without a suffix passes."""
    if Path(data).suffix:
        next(sources.rows_or_raise(data), None)


def show_plan(recipe: Recipe, stage: str, screen: Screen, passes: int | None = None) -> None:
    """Print the recipe and the plan of a stage, for --dry-run."""
    screen.loading(recipe.base.model)
    from lora_align.plan import planner

    plan = planner.plan_stages(recipe, [stage], screen, passes=passes)
    parts = [planner.resolved(recipe, stage), plan.summary(lengths=True)]
    screen.result("\n\n".join(parts), {"recipe": recipe.as_dict(), **plan.as_json()})

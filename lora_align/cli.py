"""The command line: parse, call, print. Anything heavy is imported by the command that needs it."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from lora_align import __version__, runs
from lora_align import recipe as recipes
from lora_align.console import Screen, inert, library_log, table
from lora_align.errors import RunFailedError, Stopped, UserError
from lora_align.preference import NAME, Direction, parse_weights
from lora_align.recipe import Recipe

app = typer.Typer(
    help="Turn preferences into LoRA adapters that add and subtract.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", envvar="LORA_ALIGN_RECIPE", help="A built-in recipe's name, or a .toml file.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe value.")]
RunsOption = Annotated[Path, typer.Option("--runs", envvar="LORA_ALIGN_RUNS", help="Where runs are kept.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Publish under this name.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Move an existing run aside.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Train on the first N rows only.")]


@app.command()
def demo(
    runs_dir: RunsOption = Path("lora-align-demo"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The whole story on the built-in base: train, subtract, mix, talk. On a CPU, with no network."""
    from lora_align.demo import story

    story.tell(runs_dir, Screen(as_json, quiet))


@app.command("recipes")
def list_recipes(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the built-in recipes."""
    found = {name: recipes.load(path) for name, path in recipes.builtin().items()}
    rows = [[name, recipe.base.model, recipe.about] for name, recipe in found.items()]
    data = {name: {"base": recipe.base.model, "about": recipe.about} for name, recipe in found.items()}
    Screen(as_json, quiet).result(table(["recipe", "base", "about"], rows), data)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The built-in recipe to start from.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy a built-in recipe to ./lora-align.toml, to be made your own."""
    path, _ = recipes.find(name)
    if recipes.LOCAL.exists() and not force:
        raise UserError(f"./{recipes.LOCAL} exists; --force replaces it")
    recipes.LOCAL.write_bytes(path.read_bytes())
    text = f"wrote ./{recipes.LOCAL} from {name}; every command here now uses it"
    Screen(as_json, quiet).result(text, {"wrote": str(recipes.LOCAL), "from": name})


@app.command()
def sft(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    force: ForceOption = False,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the start policy's adapter, where the recipe has an [sft] table."""
    screen = Screen(as_json, quiet)
    project = _recipe(recipe, _limited(overrides, "sft", limit), screen)
    from lora_align.stages import sft as stage

    run = stage.run(project, runs_dir, screen, force=force)
    screen.result(stage.told(run), _facts(run))


@app.command()
def dpo(
    pref: Annotated[str | None, typer.Option("--pref", help="A preference of the recipe.")] = None,
    direction: Annotated[
        str, typer.Option("--direction", help="pos: towards it; neg: away from it, labels switched; both.")
    ] = "both",
    every: Annotated[bool, typer.Option("--all", help="Every preference of the recipe.")] = False,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a preference's adapters: pos towards it, neg away from it."""
    screen = Screen(as_json, quiet)
    project = _recipe(recipe, _limited(overrides, "dpo", limit), screen)
    if every == (pref is not None):
        raise UserError(f"dpo: either --pref NAME or --all (the recipe knows: {', '.join(project.preferences)})")
    if every and name:
        raise UserError("dpo: --name goes with one --pref")
    if direction not in ("pos", "neg", "both"):
        raise UserError(f"--direction {direction!r}: pos, neg or both")
    names = list(project.preferences) if pref is None else [pref]
    directions = list(Direction) if direction == "both" else [Direction(direction)]
    for preference in names:  # before anything heavy is imported
        project.preference(preference)
    from lora_align.stages import dpo as stage

    done = stage.run(project, names, directions, runs_dir, screen, name=_name(name), force=force)
    screen.result("\n".join(stage.told(run) for run in done), {"runs": [_facts(run) for run in done]})


@app.command()
def reward(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the reward model: a head for each thing raters or pairs judge."""
    screen = Screen(as_json, quiet)
    project = _recipe(recipe, _limited(overrides, "reward", limit), screen)
    from lora_align.stages import reward as stage

    run = stage.run(project, runs_dir, screen, name=_name(name), force=force)
    screen.result(stage.told(run), _facts(run))


@app.command()
def score(
    data: Annotated[str, typer.Option("--data", help="Answers or pairs: a file, or a data set's hub id.")],
    out: Annotated[Path, typer.Option("--out", help="A new .jsonl or .parquet file: the rows and their scores.")],
    by: Annotated[
        str, typer.Option("--by", help="A reward model's name, or pair:PREFERENCE for its two adapters.")
    ] = "reward",
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score answers, or both answers of pairs; goes on where it was stopped."""
    screen = Screen(as_json, quiet)
    project = _recipe(recipe, overrides, screen, runs_dir)
    from lora_align.stages import score as stage

    result = stage.run(project, runs_dir, data, out, by, screen)
    screen.result(stage.told(result), result)


@app.command()
def merge(
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="As in helpful=1,harmless=-0.5; names, runs or folders.")
    ],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Compress to this rank.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write to this folder instead of runs/mix/NAME.")] = None,
    with_start: Annotated[
        bool, typer.Option("--with-start/--without-start", help="Whether the mix holds the SFT adapter too.")
    ] = True,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add weighted preference vectors up to one ordinary adapter."""
    screen = Screen(as_json, quiet)
    wanted = parse_weights(weights)
    if out is not None and (name is not None or not out.name):
        raise UserError("merge: --out takes the path of a new folder, and goes without --name")
    project = _recipe(recipe, overrides, screen, runs_dir)
    from lora_align.stages import mix

    run = mix.run(
        wanted, project, runs_dir, screen, name=_name(name), out=out, rank=rank, with_start=with_start, force=force
    )
    screen.result(mix.told(run), _facts(run))


@app.command()
def chat(
    weights: Annotated[str | None, typer.Option("--weights", "-w", help="As in helpful=1,harmless=-0.5.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Any PEFT LoRA folder.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and exit.")] = None,
    system: Annotated[str, typer.Option("--system", help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same answer every time.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Talk to the newest mix, or to --weights, or to --adapter; turn weights while you talk."""
    screen = Screen(as_json, quiet)
    if weights is not None and adapter is not None:
        raise UserError("chat: either --weights or --adapter")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if prompt is not None and not prompt.strip():
        raise UserError("chat: the prompt is empty; pipe one in, or give --prompt TEXT")
    project = _recipe(recipe, overrides, screen, runs_dir)
    wanted = parse_weights(weights) if weights is not None else None
    from lora_align.chat import session as sessions
    from lora_align.chat import terminal
    from lora_align.model import base as bases
    from lora_align.model.generate import Sampling

    blend = sessions.choose(runs_dir, project, screen, wanted, adapter)
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = sessions.open_session(bases.find(project.base), runs_dir, project, blend, sampling, screen)
    session.system = system
    if prompt is not None:
        terminal.once(session, prompt.strip(), screen)
    else:
        terminal.talk(session, screen)


@app.command("list")
def list_runs(runs_dir: RunsOption = runs.DEFAULT, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List runs, oldest first, and what each is made of."""
    screen = Screen(as_json, quiet)
    found = runs.every(runs_dir, screen)
    if not found and not as_json:
        screen.note(f"no runs in {runs_dir}/ yet")
    rows = [
        [
            run.path.relative_to(runs_dir).as_posix(),
            run.manifest.created[5:16].replace("T", " "),  # 80 columns; --json has the year
            _origin(run),
            _worth(run),
        ]
        for run in found
    ]
    text = inert(table(["run", "made (UTC)", "from", "measured"], rows)) if rows else ""
    screen.result(text, {"runs": [_facts(run) for run in found]})


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lora-align {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if debug:
        os.environ["LORA_ALIGN_DEBUG"] = "1"


def _recipe(name: str | None, overrides: list[str] | None, screen: Screen, runs_dir: Path | None = None) -> Recipe:
    """The recipe meant; with none named, commands that work on runs go by the newest run's own."""
    if name is None and runs_dir is not None and not recipes.LOCAL.exists():
        made = [run for run in runs.every(runs_dir) if run.manifest.recipe]
        if made:
            screen.note(f"recipe: the one kept in {made[-1].path}")
            kept = json.loads(json.dumps(made[-1].manifest.recipe))
            return recipes.from_dict(kept, f"{made[-1].path}/{runs.MANIFEST}", overrides or [])
    path, why = recipes.find(name)
    if why:
        screen.note(why)
    return recipes.load(path, overrides or [])


def _limited(overrides: list[str] | None, stage: str, limit: int | None) -> list[str]:
    """`--limit N` is short for `--set STAGE.limit=N`."""
    return [*(overrides or []), *([f"{stage}.limit={limit}"] if limit else [])]


def _name(name: str | None) -> str | None:
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: 1 to 64 of a-z 0-9 _ - , starting with a letter or digit")
    return name


def _facts(run: runs.Run) -> dict[str, Any]:
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


def _origin(run: runs.Run) -> str:
    if run.manifest.stage == "mix":
        parts = [f"{p['weight']:+g} {p['name']}" for p in run.manifest.parents]
        return " ".join((["start"] if run.manifest.contains_start else []) + parts)
    base = run.manifest.base["model"] + (" + start" if run.manifest.start else "")
    return f"{run.manifest.data.get('source', '')} ({base})"


def _worth(run: runs.Run) -> str:
    held_out = run.manifest.metrics.get("held_out", {})
    if run.manifest.unconverged:
        return "unconverged"
    if "accuracy" in held_out:
        return f"accuracy {held_out['accuracy']:.2f}"
    return f"norm {run.manifest.metrics['norm']:.2f}" if "norm" in run.manifest.metrics else ""


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, by unwinding it."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run a command; every failure is one line on stderr and a known exit code."""
    run: Callable[..., Any] = typer.main.get_command(app)
    try:
        with _signals(), library_log(runs.cache_folder() / "log.txt"):
            code = run(standalone_mode=False)
        if code == 130:  # Typer has made this of a KeyboardInterrupt
            raise Stopped(signal.SIGINT)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as fault:
        _complain(str(fault), fault.exit_code)
    except Stopped as stop:
        _complain("stopped; nothing unfinished was published", stop.exit_code)
    except TyperException as fault:
        told = fault.format_message() if hasattr(fault, "format_message") else str(fault)
        _complain(f"{told.rstrip('.')} (see lora-align --help, or --help behind a command)", 2)
    except Exception as fault:  # noqa: BLE001 - what nobody foresaw ends in one line too
        _complain(
            f"{type(fault).__name__}: {fault} (a traceback: --debug before the command)", RunFailedError.exit_code
        )


def _complain(text: str, code: int) -> None:
    if os.environ.get("LORA_ALIGN_DEBUG"):
        traceback.print_exc()
    Screen().say("\n".join(f"error: {line}" for line in text.split("\n")))
    sys.exit(code)

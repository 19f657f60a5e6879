"""Commands that show what there is: the demo, recipes, runs."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_align import recipe as recipes
from lora_align import runs
from lora_align.cli.options import (
    JsonOption,
    LimitOption,
    QuietOption,
    RecipeOption,
    RunsOption,
    SetOption,
    drawable,
    limited,
    project_of,
)
from lora_align.console import Screen, count, table
from lora_align.data.pairs import ENOUGH
from lora_align.errors import RunFailedError, UserError
from lora_align.plan.cards import card_name as cards_known


def demo(
    runs_dir: RunsOption = Path("lora-align-demo"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole story on the built-in base: minutes on a CPU. Train, subtract, mix and measure, without a network.

    Example: lora-align demo
    """
    screen = Screen(as_json, quiet)
    screen.loading("demo")
    from lora_align.demo import story

    story.run_demo(runs_dir, screen)


def list_recipes(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the built-in recipes.

    Example: lora-align recipes
    """
    found = {name: recipes.load(path) for name, path in recipes.builtin().items()}
    width = max(32, shutil.get_terminal_size().columns - max(map(len, found)) - 2)
    rows = []
    for name, recipe in found.items():
        first, *more = textwrap.wrap(
            f"{recipe.about} ({recipe.base.model})", width, break_long_words=False, break_on_hyphens=False
        )
        rows += [[name, first], *(["", line] for line in more)]
    data = {name: {"base": recipe.base.model, "about": recipe.about} for name, recipe in found.items()}
    Screen(as_json, quiet).result(table(["recipe", "about"], rows), data)


def init(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="The built-in recipe to start from.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy a built-in recipe to ./lora-align.toml, to make your own.

    Example: lora-align init qwen3-8b
    """
    path, _ = recipes.find(name)
    if recipes.LOCAL.exists() and not force:
        raise UserError(f"./{recipes.LOCAL} exists; --force replaces it")
    recipes.LOCAL.write_bytes(path.read_bytes())
    text = f"wrote ./{recipes.LOCAL} from {name}; every command here now uses it"
    Screen(as_json, quiet).result(text, {"wrote": str(recipes.LOCAL), "from": name})


def doctor(runs_dir: RunsOption = runs.DEFAULT, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Check this machine, and say how to get what it lacks.

    Example: lora-align doctor
    """
    from lora_align.commands.doctor import as_json as findings_json
    from lora_align.commands.doctor import check_machine, summary

    findings = check_machine(runs_dir)
    Screen(as_json, quiet).result(summary(findings), findings_json(findings))
    if not findings_json(findings)["good"]:
        raise typer.Exit(RunFailedError.exit_code)


def plan(
    vram: Annotated[
        float | None, typer.Option("--vram", metavar="GB", min=1, help="Memory of a card as fast as an RTX 4090.")
    ] = None,
    card: Annotated[
        str, typer.Option("--card", metavar="NAME", help="A card by its name, as in 4090, rtx-3060 or a100.")
    ] = "",
    cards: Annotated[int, typer.Option("--cards", metavar="N", min=1, help="How many cards train together.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take one step of each stage here, and base the times on it.")
    ] = False,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Plan each stage's memory and time before training. Where it does not fit, say what to change.

    Example: lora-align plan --recipe qwen3-8b --card rtx-4090
    """
    screen = Screen(as_json, quiet)
    if measure and (card or vram or cards > 1):
        raise UserError("--measure takes a step on this machine: not with --card, --vram or --cards")
    if card:
        cards_known(card)
    project = project_of(recipe, overrides, screen)
    screen.loading(project.base.model)
    from lora_align.plan.planner import STAGES, plan_stages, summary

    found = plan_stages(project, STAGES, screen, card=card, vram=vram, cards=cards, measure=measure)
    screen.result(summary(found), found)
    if not all(stage["fits"] for stage in found["stages"]):
        raise typer.Exit(RunFailedError.exit_code)


def data(
    pref: Annotated[str, typer.Option("--pref", metavar="NAME", help="A preference of the recipe.")],
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="How many pairs to show as the model sees them.")
    ] = 2,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the lengths into this .png, .pdf or .svg file."),
    ] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look at a preference's pairs before training. Show them as the model sees them, their lengths, and what is odd.

    Example: lora-align data --pref helpful --show 3
    """
    screen = Screen(as_json, quiet)
    drawable(picture)
    project = project_of(recipe, limited(overrides, "dpo", limit), screen)
    project.preference(pref)
    screen.loading(project.base.model)
    from lora_align.commands import audit

    found = audit.audit_pairs(project, pref, show=show, picture=picture)
    screen.result(audit.summary(found), found)
    for doubt in found["doubts"]:
        screen.warn(doubt)
    if found["refused"]:
        raise UserError(found["refused"])


def list_runs(runs_dir: RunsOption = runs.DEFAULT, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List runs in the order they were made, and what each is made of.

    Example: lora-align list --runs runs
    """
    screen = Screen(as_json, quiet)
    if not runs_dir.is_dir() and (runs_dir != runs.DEFAULT or runs_dir.exists()):
        raise UserError(f"--runs {runs_dir}: there is no such folder")
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
    text = table(["run", "made (UTC)", "from", "measured"], rows) if rows else ""
    screen.result(text, {"runs": [facts(run) for run in found]})


def facts(run: runs.Run) -> dict[str, Any]:
    """A run for JSON."""
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
    measured = run.manifest.method.get("vectors") or run.manifest.method.get("axes") or {}  # by reach, by sweep
    of = run.manifest.data.get("source") or " ".join(measured)
    return f"{of} ({base})" if of else base


def _worth(run: runs.Run) -> str:
    held_out = run.manifest.metrics.get("held_out", {})
    if reasons := run.manifest.unconverged:
        return "diverged" if any(reason.startswith("diverged") for reason in reasons) else "unconverged"
    if pairs := held_out.get("pairs"):
        return f"{pairs} pairs: too few" if pairs < ENOUGH else f"accuracy {held_out['accuracy']:.2f}"
    if run.manifest.stage == "mix":
        return f"rank {run.manifest.method['rank']}"
    if "points" in run.manifest.metrics:
        return count(run.manifest.metrics["points"], "point")
    return f"norm {run.manifest.metrics['norm']:.2f}" if "norm" in run.manifest.metrics else ""

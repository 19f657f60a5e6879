"""Commands of the groups Start and Data: demo, recipes, init, doctor, plan, data, list."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from lora_align import recipe as recipes
from lora_align import runs
from lora_align.cli.shared import RECIPE, Given, check_picture, run_facts, takes
from lora_align.console import count, table
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.errors import RunFailedError, UserError
from lora_align.plan.cards import card_name


@takes("runs_dir", runs_dir=Path("lora-align-demo"))
def demo(
    given: Given,
) -> None:
    """Run the whole story on the built-in base: minutes on a CPU. Train, subtract, mix and measure, without a network.

    Example: lora-align demo
    """
    given.screen.loading("demo")
    from lora_align.demo import story

    story.run_demo(given.runs_dir, given.screen)


@takes()
def list_recipes(given: Given) -> None:
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
    given.screen.result(table(["recipe", "about"], rows), data)


@takes()
def init(
    given: Given,
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="The built-in recipe to start from.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a built-in recipe to ./lora-align.toml, to make your own.

    Example: lora-align init qwen3-8b
    """
    path, _ = recipes.find(name)
    if recipes.LOCAL.exists() and not force:
        raise UserError(f"./{recipes.LOCAL} exists; --force replaces it")
    recipes.LOCAL.write_bytes(path.read_bytes())
    text = f"wrote ./{recipes.LOCAL} from {name}; every command here now uses it"
    given.screen.result(text, {"wrote": str(recipes.LOCAL), "from": name})


@takes("runs_dir")
def doctor(given: Given) -> None:
    """Check this machine, and say how to get what it lacks.

    Example: lora-align doctor
    """
    given.screen.note("loading libraries …")
    from lora_align.commands.doctor import as_json as findings_json
    from lora_align.commands.doctor import check_machine, summary

    findings = check_machine(given.runs_dir)
    given.screen.result(summary(findings), findings_json(findings))
    if not findings_json(findings)["good"]:
        raise typer.Exit(RunFailedError.exit_code)


@takes(*RECIPE)
def plan(
    given: Given,
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
) -> None:
    """Plan each stage's memory and time before training. Where it does not fit, say what to change.

    Example: lora-align plan --recipe qwen3-8b --card rtx-4090
    """
    if measure and (card or vram or cards > 1):
        raise UserError("--measure takes a step on this machine: not with --card, --vram or --cards")
    if card:
        card_name(card)
    project = given.of_recipe()
    given.screen.loading(project.base.model)
    from lora_align.plan.planner import STAGES, plan_stages, summary

    found = plan_stages(project, STAGES, given.screen, card=card, vram=vram, cards=cards, measure=measure)
    given.screen.result(summary(found), found)
    if not all(stage["fits"] for stage in found["stages"]):
        raise typer.Exit(RunFailedError.exit_code)


@takes(*RECIPE, "limit")
def data(
    given: Given,
    pref: Annotated[str, typer.Option("--pref", metavar="NAME", help="A preference of the recipe.")],
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="How many pairs to show as the model sees them.")
    ] = 2,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the lengths into this .png, .pdf or .svg file."),
    ] = None,
) -> None:
    """Look at a preference's pairs before training. Show them as the model sees them, their lengths, and what is odd.

    Example: lora-align data --pref helpful --show 3
    """
    check_picture(picture)
    project = given.to_train("dpo")
    project.check_trains("dpo")
    project.preference(pref)
    given.screen.loading(project.base.model)
    from lora_align.commands import audit

    found = audit.audit_pairs(project, pref, show=show, picture=picture)
    given.screen.result(audit.summary(found), found)
    for doubt in found["doubts"]:
        given.screen.warn(doubt)
    if found["refused"]:
        raise UserError(found["refused"])


@takes("runs_dir")
def list_runs(given: Given) -> None:
    """List runs in the order they were made, and what each is made of.

    Example: lora-align list --runs runs
    """
    if not given.runs_dir.is_dir() and (given.runs_dir != runs.DEFAULT or given.runs_dir.exists()):
        raise UserError(f"--runs {given.runs_dir}: there is no such folder")
    found = runs.list_runs(given.runs_dir, given.screen)
    if not found and not given.as_json:
        given.screen.note(f"no runs in {given.runs_dir}/ yet")
    rows = [
        [
            run.path.relative_to(given.runs_dir).as_posix(),
            run.manifest.created[5:16].replace("T", " "),  # 80 columns; --json has the year
            _origin(run),
            _worth(run),
        ]
        for run in found
    ]
    text = table(["run", "made (UTC)", "from", "measured"], rows) if rows else ""
    given.screen.result(text, {"runs": [run_facts(run) for run in found]})


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
        return f"{count(pairs, 'pair')}: too few" if pairs < MIN_HELD_OUT else f"accuracy {held_out['accuracy']:.2f}"
    if run.manifest.stage == "mix":
        return f"rank {run.manifest.method.get('rank', '?')}"
    if "points" in run.manifest.metrics:
        return count(run.manifest.metrics["points"], "point")
    return f"norm {run.manifest.metrics['norm']:.2f}" if "norm" in run.manifest.metrics else ""

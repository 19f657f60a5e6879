"""The commands demo, recipes, init, doctor, plan and data."""

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lora_align import described_pairs, run_writer
from lora_align import recipe as recipes
from lora_align.cli.shared import RUNS, Given, ServedModelOption, check_picture, check_text, check_url, takes
from lora_align.console import table
from lora_align.errors import RunFailedError, UserError
from lora_align.mix_weights import RESERVED
from lora_align.plan.cards import card_name
from lora_align.recipe.description import preference_table

GIGABYTES = re.compile(r"(\d+) GB")  # GPU memory in a recipe's `about`


@takes("runs_dir", runs_dir=Path("lora-align-demo"))
def demo(given: Given) -> None:
    """Train, mix and measure vectors on the demo base, in minutes. It needs no network and no GPU.

    Example: lora-align demo
    """
    given.screen.loading("demo")
    from lora_align.demo import story

    story.run_demo(given.runs_dir, given.screen)


@takes()
def list_recipes(given: Given) -> None:
    """List the built-in recipes, those for the least GPU memory first.

    Example: lora-align recipes
    """
    loaded = {name: recipes.load(path) for name, path in recipes.builtin().items()}
    builtin = dict(sorted(loaded.items(), key=lambda named: [int(gb) for gb in GIGABYTES.findall(named[1].about)]))
    rows = [[name, f"{recipe.about} ({recipe.base.model})"] for name, recipe in builtin.items()]
    data = {name: {"base": recipe.base.model, "about": recipe.about} for name, recipe in builtin.items()}
    given.screen.result(table(["recipe", "about"], rows, shutil.get_terminal_size().columns), data)


@takes()
def init(
    given: Given,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe to copy: a built-in one, which `lora-align recipes` lists, or a .toml file.",
        ),
    ] = None,
    describe: Annotated[
        str | None,
        typer.Option(
            "--describe",
            metavar="TEXT",
            help='Add a preference with this description, as in "more concise, less flattery".',
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe to ./lora-align.toml, or add a preference to it.

    Example: lora-align init qwen3-8b
    """
    if name is None and not (describe and recipes.LOCAL.exists()):
        raise UserError("init: name a recipe to copy, as in `lora-align init qwen3-8b`")
    if name and recipes.LOCAL.exists() and not force:
        raise UserError(f"./{recipes.LOCAL} exists; --force replaces it")
    path, _ = recipes.find(name)
    recipes.load(path)  # refuses a file with faults
    text, added = path.read_text(encoding="utf-8"), ""
    if describe:
        check_text("--describe", describe)
        added, table_of = preference_table(describe)
        if added in recipes.load(path).preferences:
            raise UserError(f"{path} has a preference {added!r} already; begin --describe with another word")
        if added in RESERVED:
            raise UserError(f"--describe: {added!r} is reserved as a name; begin with another word")
        text = f"{text.rstrip()}\n\n{table_of}"
    recipes.LOCAL.write_text(text, encoding="utf-8", newline="\n")
    wrote = f"wrote ./{recipes.LOCAL} from {name}; every command in this folder now uses it" if name else ""
    made = f"added [preferences.{added}] to ./{recipes.LOCAL}: edit its sentences, then `lora-align dpo --pref {added}`"
    lines = [*([wrote] if wrote else []), *([made] if added else [])]
    given.screen.result("\n".join(lines), {"wrote": str(recipes.LOCAL), "from": name, "added": added})


@takes("runs_dir")
def doctor(given: Given) -> None:
    """Check this machine, and name a remedy for each fault.

    Example: lora-align doctor
    """
    given.screen.note("loading libraries …")
    from lora_align.commands.doctor import check_machine

    diagnosis = check_machine(given.runs_dir)
    given.show(diagnosis)
    if not diagnosis.good:
        raise typer.Exit(RunFailedError.exit_code)


@takes(*RUNS)
def plan(
    given: Given,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram",
            metavar="GB",
            min=1,
            help="Plan for a card with this memory. Its speed is that of --card, by default an RTX 4090.",
        ),
    ] = None,
    card: Annotated[
        str,
        typer.Option(
            "--card", metavar="NAME", help="Plan for this card, as in 4090, rtx-3060 or a100, instead of this machine."
        ),
    ] = "",
    cards: Annotated[
        int, typer.Option("--cards", metavar="N", min=1, help="The number of cards (processes) that train together.")
    ] = 1,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run a step of each training stage that fits on this machine, and base its time and memory on it.",
        ),
    ] = False,
) -> None:
    """Plan the memory and time of each stage before training. If a stage does not fit, name settings that help.

    Example: lora-align plan --recipe qwen3-8b --card rtx-4090
    """
    if measure and (card or vram or cards > 1):
        raise UserError("--measure runs a step on this machine; leave out --card, --vram and --cards")
    if card:
        card_name(card)
    recipe = given.recipe_to_train()
    given.screen.loading(recipe.base.model)
    from lora_align.plan.planner import STAGES, plan_stages

    plan = plan_stages(recipe, STAGES, given.screen, card=card, vram=vram, cards=cards, measure=measure)
    given.show(plan)
    if not all(stage.estimate.fits for stage in plan.stages):
        raise typer.Exit(RunFailedError.exit_code)


@takes(*RUNS, "limit")
def data(
    given: Given,
    pref: Annotated[str, typer.Option("--pref", metavar="NAME", help="The preference of the recipe to audit.")],
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Print this many pairs as the model sees them.")
    ] = 2,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Plot the lengths to this .png, .pdf or .svg file."),
    ] = None,
) -> None:
    """Audit a preference's pairs before training. Print lengths, warnings, and examples as the model sees them.

    Example: lora-align data --pref helpful --show 3
    """
    check_picture(picture)
    recipe = given.recipe_to_train("dpo")
    recipe.check_trains("dpo")
    given.check_pairs(recipe, [pref])
    given.screen.loading(recipe.base.model)
    from lora_align.commands.audit import audit_pairs

    audit = audit_pairs(recipe, pref, show=show, picture=picture)
    given.show(audit)
    for warning in audit.doubts:
        given.screen.warn(warning)
    if audit.refused:
        raise UserError(audit.refused)


@takes(*RUNS, "force")
def pairs(
    given: Given,
    pref: Annotated[str, typer.Option("--pref", metavar="NAME", help="The described preference of the recipe.")],
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="Sample on this OpenAI-compatible server, of a larger model."),
    ] = None,
    model: ServedModelOption = "",
) -> None:
    """Make a preference's pairs from its description.

    Answers are sampled under the system prompts `more` and `less`. The same command continues after a stop.

    Example: lora-align pairs --pref warm
    """
    check_url("--endpoint", endpoint)
    recipe = given.recipe_to_train()
    recipe.preference(pref)
    run_writer.refuse_before_training(
        described_pairs.folder(pref, given.runs_dir), force=given.force, resume=False, remedy="--runs DIR keeps both"
    )
    given.screen.loading(recipe.base.model)
    from lora_align.commands.make_pairs import make_pairs, summary
    from lora_align.model.endpoint import Endpoint

    server = Endpoint.at(endpoint, model, template=recipe.base.chat_template_kwargs) if endpoint else None
    run = make_pairs(recipe, pref, given.runs_dir, given.screen, server=server, force=given.force)
    given.screen.result(summary(run), run.as_json())

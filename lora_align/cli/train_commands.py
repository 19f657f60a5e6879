"""Commands that train."""

from dataclasses import replace
from typing import Annotated

import typer

from lora_align import runs
from lora_align.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    LimitOption,
    NameOption,
    QuietOption,
    RecipeOption,
    ResumeOption,
    RunsOption,
    SetOption,
    checked,
    either,
    limited,
    planned,
    project_of,
)
from lora_align.cli.start_commands import facts
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.rankers import Direction


def sft(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    force: ForceOption = False,
    resume: ResumeOption = False,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the start policy's adapter, by the recipe's [sft] table.

    Example: lora-align sft --recipe my.toml --limit 1000
    """
    screen = Screen(as_json, quiet)
    either(force, resume)
    project = project_of(recipe, limited(overrides, "sft", limit), screen)
    if dry_run:
        planned(project, "sft", screen)
        return
    screen.loading(project.base.model)
    from lora_align.train.sft import summary, train_sft

    run = train_sft(project, runs_dir, screen, force=force, resume=resume)
    screen.result(summary(run), facts(run))


def dpo(
    pref: Annotated[str | None, typer.Option("--pref", metavar="NAME", help="One preference of the recipe.")] = None,
    direction: Annotated[
        str,
        typer.Option(
            "--direction", metavar="pos|neg|both", help="pos: towards it; neg: away from it, labels switched; both."
        ),
    ] = "both",
    every: Annotated[bool, typer.Option("--all", help="Every preference of the recipe.")] = False,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a preference's adapters: pos towards it, neg away from it.

    Example: lora-align dpo --pref helpful --set dpo.beta=0.05
    """
    screen = Screen(as_json, quiet)
    either(force, resume)
    project = project_of(recipe, limited(overrides, "dpo", limit), screen)
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
    if dry_run:
        if pref is not None:  # of one that consists of others, theirs
            chosen = {name: project.preferences[name] for name in project.preferences[pref].of or (pref,)}
            project = replace(project, preferences=chosen)
        planned(project, "dpo", screen, passes=len(directions))
        return
    screen.loading(project.base.model)
    from lora_align.train.dpo import summary, train_dpo

    done = train_dpo(project, names, directions, runs_dir, screen, name=checked(name), force=force, resume=resume)
    screen.result("\n".join(summary(run) for run in done), {"runs": [facts(run) for run in done]})


def reward(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the reward model: one head for each objective.

    Example: lora-align reward --recipe my.toml
    """
    screen = Screen(as_json, quiet)
    either(force, resume)
    project = project_of(recipe, limited(overrides, "reward", limit), screen)
    if dry_run:
        planned(project, "reward", screen)
        return
    screen.loading(project.base.model)
    from lora_align.train.reward import summary, train_reward_model

    run = train_reward_model(project, runs_dir, screen, name=checked(name), force=force, resume=resume)
    screen.result(summary(run), facts(run))


def rsf(
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", metavar="N", min=1, help="Policies to train after the SteerLM-style one."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint", metavar="URL", help="Sample on this OpenAI-compatible server, which can load adapters."
        ),
    ] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one policy that takes a direction, by rejection sampling. Continues where it was stopped.

    Example: lora-align rsf --iterations 2
    """
    screen = Screen(as_json, quiet)
    either(force, resume)  # it goes on in any case, unless it is to begin anew
    settings = limited(overrides, "rsf", limit)
    settings += [f"rsf.iterations={iterations}"] if iterations is not None else []
    project = project_of(recipe, settings, screen)
    if dry_run:
        planned(project, "rsf", screen)
        return
    screen.loading(project.base.model)
    from lora_align.rsf.loop import summary, train_rsf

    made = train_rsf(project, runs_dir, screen, name=checked(name), force=force, endpoint=endpoint)
    screen.result(summary(made, runs_dir), {"runs": [facts(run) for run in made]})

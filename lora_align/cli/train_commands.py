"""The commands that train: sft, dpo, reward and rsf."""

from dataclasses import replace
from typing import Annotated

import typer

from lora_align import described_pairs
from lora_align.cli.shared import RESUME_OR_FORCE, TRAINING, Given, check_url, show_plan, takes
from lora_align.errors import UserError
from lora_align.policy import judge_runs
from lora_align.rankers import Direction


@takes(*TRAINING)
def sft(given: Given) -> None:
    """Train the start policy's adapter by supervised fine-tuning.

    Example: lora-align sft --recipe my.toml --limit 1000
    """
    recipe = given.recipe_to_train("sft")
    recipe.check_trains("sft")
    if given.dry_run:
        show_plan(recipe, "sft", given.screen)
        return
    given.refuse_existing(given.runs_dir / "sft" / "start", "--runs DIR keeps both")
    given.screen.loading(recipe.base.model)
    from lora_align.train.sft import summary, train_sft

    run = train_sft(recipe, given.runs_dir, given.screen, force=given.force, resume=given.resume)
    given.screen.result(summary(run), run.as_json())


@takes(*TRAINING, "name")
def dpo(
    given: Given,
    pref: Annotated[
        str | None, typer.Option("--pref", metavar="NAME", help="Train this preference of the recipe.")
    ] = None,
    direction: Annotated[
        str,
        typer.Option(
            "--direction",
            metavar="pos|neg|both",
            help="Train towards the preference (pos), away from it by switched labels (neg), or both.",
        ),
    ] = "both",
    every: Annotated[bool, typer.Option("--all", help="Train every preference of the recipe.")] = False,
) -> None:
    """Train a preference's adapters by DPO: towards it and away from it.

    Example: lora-align dpo --pref helpful --set dpo.beta=0.05
    """
    recipe = given.recipe_to_train("dpo")
    recipe.check_trains("dpo")
    if every == (pref is not None):
        raise UserError(f"dpo: give either --pref NAME or --all (preferences: {', '.join(recipe.preferences)})")
    if every and given.name:
        raise UserError("dpo: --name needs --pref, not --all")
    names = list(recipe.preferences) if pref is None else [pref]
    directions = Direction.parse(direction)
    unmade = described_pairs.missing(recipe, names, given.runs_dir)
    complete = [name for name in names if given.dry_run or not {*(recipe.preference(name).of or (name,))} & {*unmade}]
    given.check_pairs(recipe, complete)
    if given.dry_run:
        if pref is not None:  # a preference with `of` uses the pairs of other preferences
            chosen = {name: recipe.preferences[name] for name in recipe.preferences[pref].of or (pref,)}
            recipe = replace(recipe, preferences=chosen)
        show_plan(recipe, "dpo", given.screen, passes=len(directions))
        return
    for preference in names:
        for side in directions:
            target = given.runs_dir / "dpo" / (given.name or preference) / side.value
            given.refuse_existing(target, "--resume keeps it and trains what is missing")
    given.screen.loading(recipe.base.model)
    if unmade:
        from lora_align.commands.make_pairs import make_missing

        recipe = make_missing(recipe, names, given.runs_dir, given.screen)
    from lora_align.train.dpo import summary, train_dpo

    done = train_dpo(
        recipe,
        names,
        directions,
        given.runs_dir,
        given.screen,
        name=given.name,
        force=given.force,
        resume=given.resume,
    )
    given.screen.result("\n".join(summary(run) for run in done), {"runs": [run.as_json() for run in done]})


@takes(*TRAINING, "name")
def reward(given: Given) -> None:
    """Train a reward model. It has a head for each rated attribute, and for each name in [reward.pairs].

    Example: lora-align reward --recipe my.toml
    """
    recipe = given.recipe_to_train("reward")
    recipe.check_trains("reward")
    if given.dry_run:
        show_plan(recipe, "reward", given.screen)
        return
    given.refuse_existing(given.runs_dir / "reward" / (given.name or "reward"))
    given.screen.loading(recipe.base.model)
    from lora_align.train.reward import summary, train_reward_model

    run = train_reward_model(
        recipe, given.runs_dir, given.screen, name=given.name, force=given.force, resume=given.resume
    )
    given.screen.result(summary(run), run.as_json())


@takes(*(option for option in TRAINING if option != "resume"), "name")
def rsf(
    given: Given,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            metavar="N",
            min=1,
            help="The number of policies (t1, t2, …) to train after the SteerLM-style policy.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Sample on this OpenAI-compatible server, which must be able to load adapters.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="No effect: the same command continues a stopped run.")
    ] = False,
) -> None:
    """Train policies that take a direction, by rejection sampling. The same command continues after a stop.

    Example: lora-align rsf --iterations 2
    """
    check_url("--endpoint", endpoint)
    if resume and given.force:
        raise UserError(RESUME_OR_FORCE)
    recipe = given.recipe_to_train("rsf", *([f"rsf.iterations={iterations}"] if iterations is not None else []))
    recipe.check_trains("rsf")
    if given.dry_run:
        show_plan(recipe, "rsf", given.screen)
        return
    assert recipe.rsf is not None
    judge_runs.of_reward(recipe.rsf.reward, given.runs_dir)
    given.screen.loading(recipe.base.model)
    from lora_align.rsf.loop import summary, train_rsf

    made = train_rsf(recipe, given.runs_dir, given.screen, name=given.name, force=given.force, endpoint=endpoint)
    given.screen.result(summary(made, given.runs_dir), {"runs": [run.as_json() for run in made]})

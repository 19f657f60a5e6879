"""Commands that measure: eval, sweep, tune, reach."""

from dataclasses import replace
from typing import Annotated

import typer

from lora_align import runs
from lora_align.cli.shared import MEASURES, ByOption, Given, check_url, takes
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.evaluate.grid import grid
from lora_align.policy import safe_ranges, vectors
from lora_align.policy.policy import find_policies, newest_conditioned, weighted
from lora_align.weights import name_of, parse_weights


@takes(*MEASURES)
def evaluate(
    given: Given,
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="helpful=1,harmless=0.5 · want:verbosity=-1 · a run or adapter · mix · start · base",
        ),
    ] = None,
    by: ByOption = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL", help="An OpenAI-compatible server whose model reads both answers."),
    ] = None,
    judge_model: Annotated[
        str, typer.Option("--judge-model", metavar="NAME", help="The model's name on that server.")
    ] = "",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", metavar="NAME|FILE", help="A task of lm-evaluation-harness, or its .yaml file. Repeatable."
        ),
    ] = None,
) -> None:
    """Compare the first policy with the others on the same prompts.

    Without any: the newest mix against the start policy.

    Example: lora-align eval helpful=1 start --by pair:helpful
    """
    check_url("--judge", judge)
    project = given.of_runs()
    chosen = find_policies(policies or ["mix", "start"], project, given.runs_dir, given.screen)
    given.check_judges(by, project)
    given.screen.loading(project.base.model)
    from lora_align.evaluate.compare import compare_policies
    from lora_align.evaluate.lm_eval_tasks import task_figures
    from lora_align.evaluate.measure import Evaluator
    from lora_align.model.endpoint import Endpoint

    server = Endpoint.at(judge, judge_model, options=("--judge", "--judge-model")) if judge else None
    evaluator = Evaluator.of(chosen, project, given.runs_dir, given.screen, by or ())
    result = compare_policies(
        evaluator, given.screen, server, task_figures(tasks, evaluator, given.screen) if tasks else {}
    )
    given.screen.result(result.summary(), result.as_json())


@takes(*MEASURES, "name", "force")
def sweep(
    given: Given,
    axes: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=FROM:TO:STEP", help="An axis, as in helpful=-1:1:0.5.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="POLICY", help="A policy beside the grid, as `eval` takes it. Repeatable."),
    ] = None,
    directions: Annotated[
        int, typer.Option("--directions", metavar="N", min=0, help="Measure this many directions of the newest policy.")
    ] = 0,
    by: ByOption = None,
) -> None:
    """Measure a grid of weights or directions, and draw it. Continues where it was stopped.

    Example: lora-align sweep helpful=-1:1:0.5 harmless=0:1
    """
    name = given.name or name_of(axis.partition("=")[0] for axis in axes or ["directions"])
    target = given.runs_dir / "sweep" / name
    project = given.of_runs()
    values, _ = grid(axes or [])
    given.check_vectors(values, project)
    find_policies(also or [], project, given.runs_dir, Screen(quiet=True))
    given.check_judges(by, project)
    if directions:
        newest_conditioned(given.runs_dir, "--directions", given.screen)
    given.screen.loading(project.base.model)
    from lora_align.evaluate.measure import Evaluator
    from lora_align.evaluate.sweep import plan_sweep, run_sweep

    runs.refuse_existing(target, given.force)
    plan = plan_sweep(axes or [], directions, also or [], given.runs_dir, given.screen)
    policies = find_policies(plan.policies, project, given.runs_dir, given.screen)
    evaluator = Evaluator.of(policies, project, given.runs_dir, given.screen, by or ())
    result = run_sweep(plan, evaluator, project, target, given.screen, force=given.force)
    given.screen.result(f"{result.summary()}\n\n{target}/report.html", {"sweep": str(target), **result.as_json()})


@takes(*MEASURES)
def tune(
    given: Given,
    aim: Annotated[
        str,
        typer.Option(
            "--aim", metavar="NAME=SHARE,…", help="The share of each preference, as in helpful=0.6,harmless=0.4."
        ),
    ],
    kl: Annotated[
        float, typer.Option("--kl", metavar="NATS", min=1e-6, help="Maximum KL from the start policy, per token.")
    ] = 0.2,
    loss: Annotated[
        float,
        typer.Option("--loss", metavar="NATS", min=1e-6, help="Maximum rise of the loss on ordinary text, per token."),
    ] = 0.05,
    refused: Annotated[
        float,
        typer.Option(
            "--refused", metavar="SHARE", min=0.0, help="Maximum increase in the refusal rate on safe prompts."
        ),
    ] = 0.02,
    most: Annotated[float, typer.Option("--most", metavar="WEIGHT", min=1e-6, help="The largest weight.")] = 1.0,
    groups: Annotated[
        int,
        typer.Option(
            "--groups", metavar="N", min=1, help="Split the layers into this many groups, each with weights of its own."
        ),
    ] = 1,
) -> None:
    """Find weights by gradient on held-out pairs, without a grid. Weights stay within the bounds below.

    Example: lora-align tune --aim helpful=0.6,harmless=0.4 --kl 0.2
    """
    aims = parse_weights(aim)
    if min(aims.values()) <= 0:
        raise UserError(
            "--aim: a share must be above 0; for the opposite of a preference, merge it with a negative weight"
        )
    project = given.of_runs()
    given.check_vectors(aims, project)
    given.screen.loading(project.base.model)
    from lora_align.evaluate import tune as tuning
    from lora_align.evaluate.measure import FOLDER, Evaluator
    from lora_align.evaluate.test_set import read_test_set
    from lora_align.evaluate.tune_objective import Bounds
    from lora_align.model import base as bases
    from lora_align.plan.stages import TUNED
    from lora_align.policy.policy_set import PolicySet

    project = replace(project, eval=replace(project.eval, pairs=min(project.eval.pairs, TUNED)))
    names = [part for name in aims for part in tuning.layer_groups(name, groups, project, given.runs_dir)]
    policy = weighted(dict.fromkeys(names, 1.0), project, given.runs_dir)
    policies = PolicySet.of([policy], project, bases.find(project.base), given.runs_dir, given.screen)
    tuned = tuning.tune_weights(
        Evaluator(policies, read_test_set(project, given.screen, aims), given.runs_dir / FOLDER),
        {name: share / sum(aims.values()) for name, share in aims.items()},
        Bounds(kl, loss, refused, most),
        project.dpo,
        given.screen,
    )
    given.screen.result(tuned.summary(given.runs_dir), tuned.as_json())


@takes(*MEASURES, "name", "force")
def reach(
    given: Given,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Preferences; without any: all trained ones.")
    ] = None,
    kl: Annotated[
        float, typer.Option("--kl", metavar="NATS", min=1e-6, help="Maximum KL from the start policy, per token.")
    ] = 0.2,
    loss: Annotated[
        float,
        typer.Option("--loss", metavar="NATS", min=1e-6, help="Maximum rise of the loss on ordinary text, per token."),
    ] = 0.1,
    share: Annotated[
        float,
        typer.Option(
            "--share", metavar="SHARE", min=1e-6, help="Maximum loss of refusals and known facts: 0.1 is 10 %."
        ),
    ] = 0.1,
) -> None:
    """Find the largest weights before quality breaks. `merge` and `chat` warn beyond them.

    Each vector is tried alone, and with each other vector.

    Example: lora-align reach helpful harmless
    """
    project = given.of_runs()
    names = list(dict.fromkeys(names or vectors.trained(given.runs_dir)))
    if not names:
        command = runs.command("dpo --all", given.runs_dir)
        raise UserError(f"reach: no preference has both its adapters in {given.runs_dir}/; `{command}` trains them")
    policy = weighted(dict.fromkeys(names, 1.0), project, given.runs_dir)
    given.screen.loading(project.base.model)
    from lora_align.evaluate.measure import Evaluator
    from lora_align.evaluate.reach import Limits, find_reach

    evaluator = Evaluator.of([policy], project, given.runs_dir, given.screen, preferences=names)
    target = given.runs_dir / safe_ranges.FOLDER / (given.name or name_of(names))
    found = find_reach(evaluator, Limits(kl, loss, share), project, target, given.screen, force=given.force)
    summary = f"{found.summary()}\n\n{target}: merge and chat warn beyond these weights"
    given.screen.result(summary, {"reach": str(target), **found.as_json()})

"""The commands that measure: eval, sweep, tune and reach; and list."""

from dataclasses import replace
from typing import Annotated

import typer

from lora_align import run_writer, runs
from lora_align.cli.shared import RUNS, ByOption, Given, check_url, takes
from lora_align.commands import list_runs as run_list
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.evaluate.grid import grid
from lora_align.mix_weights import name_of, parse_weights
from lora_align.policy import safe_ranges, vectors
from lora_align.policy.policy import find_policies, newest_conditioned, weighted


@takes(*RUNS)
def evaluate(
    given: Given,
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Weights (helpful=1,harmless=0.5), a preference or a run by its name, a direction "
            "(want:verbosity=-1), an adapter folder, or one of the words mix, start and base.",
        ),
    ] = None,
    by: ByOption = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL", help="Let the model of this OpenAI-compatible server compare answers."),
    ] = None,
    judge_model: Annotated[
        str,
        typer.Option(
            "--judge-model",
            metavar="NAME",
            help="The name of the model on the judge's server; needed if the server has several.",
        ),
    ] = "",
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="Sample the answers on this vLLM server (docs/serving.md)."),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="NAME", help="The base's name on the server; needed if it has several."),
    ] = "",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME|FILE",
            help="Run this task of lm-evaluation-harness, or the task of a .yaml file; repeatable.",
        ),
    ] = None,
) -> None:
    """Compare the first policy with the others on the same prompts.

    By default, compare the newest mix with the start policy.

    Example: lora-align eval helpful=1 start --by pair:helpful
    """
    check_url("--judge", judge)
    check_url("--endpoint", endpoint)
    if model and not endpoint:
        raise UserError("eval: --model has no effect without --endpoint")
    recipe = given.recipe_of_runs()
    chosen = find_policies(policies or ["mix", "start"], recipe, given.runs_dir, given.screen)
    given.check_judges(by, recipe)
    given.screen.loading(recipe.base.model)
    from lora_align.evaluate.compare import compare_policies
    from lora_align.evaluate.lm_eval_tasks import task_figures
    from lora_align.evaluate.measure import Evaluator
    from lora_align.model.endpoint import Endpoint

    judging = Endpoint.at(judge, judge_model, options=("--judge", "--judge-model")) if judge else None
    sampling = Endpoint.at(endpoint, model, template=recipe.base.chat_template_kwargs) if endpoint else None
    sampling = replace(sampling, token_ids=True) if sampling else None
    evaluator = Evaluator.of(chosen, recipe, given.runs_dir, given.screen, by or (), server=sampling)
    result = compare_policies(
        evaluator, given.screen, judging, task_figures(tasks, evaluator, given.screen) if tasks else {}
    )
    given.show(result)


@takes(*RUNS, "name", "force")
def sweep(
    given: Given,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=FROM:TO:STEP",
            help="A preference and its weights, as in helpful=-1:1:0.5. The default of STEP is 0.5.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="POLICY", help="Also measure this policy, written as for `eval`; repeatable."),
    ] = None,
    directions: Annotated[
        int,
        typer.Option(
            "--directions", metavar="N", min=0, help="Measure the newest policy of `rsf` in this many directions."
        ),
    ] = 0,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="POLICY",
            help='Compare the only axis with this rival at equal KL, as in "prompt:Be brief."; repeatable.',
        ),
    ] = None,
    by: ByOption = None,
) -> None:
    """Measure and plot a grid of weights or directions. The same command continues after a stop.

    Example: lora-align sweep helpful=-1:1:0.5 harmless=0:1
    """
    name = given.name or name_of(axis.partition("=")[0] for axis in axes or ["directions"])
    target = given.runs_dir / "sweep" / name
    recipe = given.recipe_of_runs()
    if not axes and not directions:
        raise UserError("sweep: nothing to measure; name an axis, as in helpful=-1:1:0.5, or give --directions N")
    values, _ = grid(axes or [])
    if against and len(values) != 1:
        raise UserError("sweep: --against compares one preference with its rivals; name one axis")
    if against and recipe.eval.temperature != 1:
        raise UserError("sweep: --against needs answers that are sampled at temperature 1; set eval.temperature=1")
    run_writer.refuse_existing(target, given.force)
    given.check_vectors(values, recipe)
    find_policies(also or [], recipe, given.runs_dir, Screen(quiet=True))
    rivals = find_policies(against or [], recipe, given.runs_dir, Screen(quiet=True))
    given.check_judges(by, recipe)
    if directions:
        newest_conditioned(given.runs_dir, "--directions", given.screen)
    given.screen.loading(recipe.base.model)
    from lora_align.evaluate.measure import Evaluator
    from lora_align.evaluate.sweep import plan_sweep, run_sweep

    plan = plan_sweep(axes or [], directions, also or [], given.runs_dir, given.screen, rivals)
    policies = find_policies(plan.policies, recipe, given.runs_dir, given.screen)
    evaluator = Evaluator.of(policies, recipe, given.runs_dir, given.screen, by or ())
    result = run_sweep(plan, evaluator, recipe, target, given.screen, force=given.force)
    given.screen.result(
        f"{result.summary()}\n\nall {result.count} policies: {target}/report.html",
        {"sweep": str(target), **result.as_json()},
    )


@takes(*RUNS)
def tune(
    given: Given,
    aim: Annotated[
        str,
        typer.Option(
            "--aim", metavar="NAME=SHARE,…", help="The importance of each preference, as in helpful=0.6,harmless=0.4."
        ),
    ],
    kl: Annotated[
        float,
        typer.Option(
            "--kl", metavar="NATS", min=1e-6, help="Maximum KL(start‖mix), per token, on answers of the start policy."
        ),
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
    most: Annotated[
        float, typer.Option("--most", metavar="WEIGHT", min=1e-6, help="Maximum absolute weight of a vector.")
    ] = 1.0,
    groups: Annotated[
        int,
        typer.Option(
            "--groups", metavar="N", min=1, help="Split the layers into this many groups with separate weights."
        ),
    ] = 1,
) -> None:
    """Find weights by gradient ascent on held-out pairs, without a grid. The options set bounds.

    Example: lora-align tune --aim helpful=0.6,harmless=0.4 --kl 0.2
    """
    aims = parse_weights(aim)
    if min(aims.values()) <= 0:
        raise UserError(
            "--aim: a share must be above 0; for the opposite of a preference, merge its vector with a negative weight"
        )
    recipe = given.recipe_of_runs()
    given.check_vectors(aims, recipe)
    given.screen.loading(recipe.base.model)
    from lora_align.evaluate.tune import tune_weights
    from lora_align.evaluate.tune_objective import Bounds

    bounds = Bounds(kl, loss, refused, most)
    tuned = tune_weights(aims, bounds, recipe, given.runs_dir, given.screen, groups=groups)
    given.screen.result(tuned.summary(given.runs_dir), tuned.as_json())


@takes(*RUNS, "name", "force")
def reach(
    given: Given,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Preferences; by default all trained ones.")
    ] = None,
    kl: Annotated[
        float,
        typer.Option(
            "--kl", metavar="NATS", min=1e-6, help="Maximum KL(policy‖start), per token, on answers of the policy."
        ),
    ] = 0.2,
    loss: Annotated[
        float,
        typer.Option("--loss", metavar="NATS", min=1e-6, help="Maximum rise of the loss on ordinary text, per token."),
    ] = 0.1,
    share: Annotated[
        float,
        typer.Option(
            "--share",
            metavar="SHARE",
            min=1e-6,
            help="Maximum worsening of a share, such as safe prompts refused or facts known.",
        ),
    ] = 0.1,
) -> None:
    """Find the largest weights before quality breaks. `merge`, `chat` and `generate` warn beyond them.

    Vectors are tried one by one and in pairs.

    Example: lora-align reach helpful harmless
    """
    recipe = given.recipe_of_runs()
    names = list(dict.fromkeys(names or vectors.trained(given.runs_dir)))
    if not names:
        command = runs.command("dpo --all", given.runs_dir)
        raise UserError(f"reach: no preference has both its adapters in {given.runs_dir}/; `{command}` trains them")
    policy = weighted(dict.fromkeys(names, 1.0), recipe, given.runs_dir)
    target = given.runs_dir / safe_ranges.FOLDER / (given.name or name_of(names))
    run_writer.refuse_existing(target, given.force)
    given.screen.loading(recipe.base.model)
    from lora_align.evaluate.measure import Evaluator
    from lora_align.evaluate.reach import Limits, find_reach

    evaluator = Evaluator.of([policy], recipe, given.runs_dir, given.screen, preferences=names)
    result = find_reach(evaluator, Limits(kl, loss, share), recipe, target, given.screen, force=given.force)
    summary = f"{result.summary()}\n\n{target}: merge and chat warn beyond these weights"
    given.screen.result(summary, {"reach": str(target), **result.as_json()})


@takes("runs_dir")
def list_runs(given: Given) -> None:
    """List runs in order of creation, with their origin and one metric.

    Example: lora-align list --runs runs
    """
    if not given.runs_dir.is_dir() and (given.runs_dir != runs.DEFAULT or given.runs_dir.exists()):
        raise UserError(f"--runs {given.runs_dir}: there is no such folder; check the path")
    given.show(run_list.list_runs(given.runs_dir, given.screen))

"""The command `rsf` (arXiv 2402.18571): in each iteration sample, score, choose, and fine-tune.

The policies are numbered as in the paper. θ₀ is a SteerLM-style policy: on one half of the prompts it learns to give
answers with requested scores. Policy t1 learns from answers of θ₀ to the other half, t2 from answers of t1 to the first
half, and so on. Every policy is trained from the start policy, not from the policy before.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import Screen, table
from lora_align.data import shards
from lora_align.data.rows import Conversation, Message, with_system_prompt
from lora_align.recipe import Recipe
from lora_align.rsf import candidates, finetune, sampling_requests
from lora_align.rsf.inputs import STEERLM, RsfInputs, prepare, teacher_of
from lora_align.rsf.selection import choose, has_fallen, is_finite, mean_and_error
from lora_align.runs import Run
from lora_align.want_direction import Want, sample_direction, scores_message

SAMPLES, SCORES = "samples.parquet", "scores.json"


def train_rsf(
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
    endpoint: str | None = None,
) -> list[Run]:
    """Train and publish θ₀ and the policy of each iteration. Policies that are published already are reused."""
    rsf = prepare(recipe, runs_dir, screen, name=name, force=force, endpoint=endpoint)
    policies = rsf.published()
    if STEERLM not in policies:
        policies[STEERLM] = _train_steerlm(rsf)
    for t in range(1, rsf.settings.iterations + 1):
        if f"t{t}" not in policies:
            teacher = policies[teacher_of(f"t{t}")]
            policies[f"t{t}"] = _train_iteration(rsf, t, teacher)
            _warn_if_watched_fell(policies[f"t{t}"], [teacher, policies[STEERLM]], rsf.settings.watch, screen)
    return [policies[label] for label in rsf.labels]


def _train_steerlm(rsf: RsfInputs) -> Run:
    """Train θ₀ on the answers of the second half. A system message requests each answer's own scores."""
    settings, target, answers = rsf.settings, rsf.target(STEERLM), rsf.answers.halves[1]
    with target.staging_folder() as staging:
        scores = candidates.scores_of(rsf, answers, target)
        scored = [
            (answer, score)
            for answer, score in zip(answers, scores, strict=True)
            if score and is_finite(score, settings.directions)
        ]
        goals = [{name: score[name] for name in settings.directions} for _, score in scored]
        examples = []
        for (answer, _), goal in zip(scored, goals, strict=True):
            prompt = with_system_prompt(scores_message(goal, settings.steer), answer.prompt)
            conversation = Conversation((*prompt, Message("assistant", answer.answer)))
            examples.append((answer.prompt, conversation))
        (staging / SCORES).write_text(json.dumps(goals))
        counts = {"rows": len(scored), "score not finite": len(answers) - len(scored)}
        manifest = rsf.manifest(counts, settings.steer, None)
        manifest = finetune.train_supervised(rsf, examples, target, staging, manifest)
        watched = [score[settings.watch] for _, score in scored if is_finite(score, [settings.watch])]
        if len(watched) > 1:
            manifest = finetune.with_metrics(manifest, watched=mean_and_error(watched))
        return target.publish(staging, manifest)


def _train_iteration(rsf: RsfInputs, t: int, teacher: Run) -> Run:
    """Train policy t on the best answers of its teacher, which is policy t − 1."""
    settings, target = rsf.settings, rsf.target(f"t{t}")
    half = rsf.answers.halves[(t - 1) % 2]
    # 1. Sample directions v for every prompt x. The first teacher, θ₀, is asked for scores instead.
    prompts = sampling_requests.prompts(settings, half, t)
    if t == 1:
        known_scores = json.loads((teacher.path / SCORES).read_text())
        requests = sampling_requests.for_scores(settings, prompts, known_scores)
    else:
        requests = sampling_requests.for_directions(settings, prompts, t)
    with target.staging_folder() as staging, candidates.open_candidates(rsf, t, teacher) as store:
        # 2. Sample n answers y of the teacher to every request, and compute their rewards r(x, y).
        candidates.sample_and_score(rsf, t, teacher, requests, store, target)
        answers = candidates.by_request(store.rows())
        shards.write(list(store.rows()), staging / SAMPLES)
        # 3. For every direction, choose the answer with the largest vᵀr.
        chosen = choose(sampling_requests.pools(settings, requests, answers, t), settings.watch)
        # 4. Fine-tune the start policy on the chosen answers, each after a system message that requests v.
        replayed = finetune.sample_replay(settings, half, len(chosen.choices), t) if settings.learn == "sft" else []
        manifest = rsf.manifest({"rows": len(chosen.choices), "replayed": len(replayed)}, "", teacher)
        if settings.learn == "dpo":
            manifest = finetune.train_by_dpo(rsf, chosen.choices, target, staging, manifest)
        else:
            examples = [sampling_requests.best_example(settings, choice) for choice in chosen.choices]
            manifest = finetune.train_supervised(rsf, [*examples, *replayed], target, staging, manifest)
        watched = chosen.figures.pop("watched", None)
        manifest = finetune.with_metrics(manifest, collected=chosen.figures, watched=watched)
        run = target.publish(staging, manifest)
    store.delete()
    return run


def _warn_if_watched_fell(run: Run, earlier: Sequence[Run], objective: str, screen: Screen) -> None:
    """Warn if the watched objective fell since the teacher or θ₀. The directions may not weigh it."""
    now = run.manifest.metrics.get("watched")
    for other in earlier:
        before = other.manifest.metrics.get("watched")
        if before and now and has_fallen(before, now):
            screen.warn(
                f"{run.path.name}: the mean {objective} of its training answers fell from {before['mean']:.1f} "
                f"({other.path.name}) to {now['mean']:.1f}; the directions may weigh it too little; "
                "add it to rsf.directions, or raise its bounds there"
            )
            return


def summary(policies: Sequence[Run], runs_dir: Path) -> str:
    """Return a table of the iterations with the mean value vᵀr of all sampled answers and of the chosen answers."""
    newest = policies[-1]
    collected: dict[str, dict[str, Any]] = {
        run.path.name: run.manifest.metrics["collected"] for run in policies if "collected" in run.manifest.metrics
    }
    objectives = list(next(iter(collected.values()))["chosen_mean"])
    columns = ["policy", "answers", "chosen", "mean value", "mean value of chosen", *objectives]
    rows = [
        [label, f"{of['answers']:,}", f"{of['chosen']:,}", f"{of['sampled_value']:.1f}", f"{of['chosen_value']:.1f}"]
        + [f"{of['chosen_mean'][name]:.1f}" for name in objectives]
        for label, of in collected.items()
    ]
    command = runs.command(f"chat --want {_example_direction(newest)}", runs_dir)
    return "\n".join([table(columns, rows), f"{newest.path}; try: {command}"])


def _example_direction(run: Run) -> str:
    """Return the middle of the region that a policy was trained on, as an argument of --want."""
    region = run.manifest.recipe["rsf"]["directions"]
    middle = {name: (low + high) / 2 for name, (low, high) in region.items()}
    shown = Want.of(middle) if any(middle.values()) else sample_direction(region, random.Random(0))
    return ",".join(f"{name}={weight:.1f}" for name, weight in shown.weights.items())

"""One policy that is asked for a direction: iterated rejection sampling from the start policy (arXiv 2402.18571).

Iterations are numbered as in the paper. Its θ₀ is a SteerLM-style policy: on one half of the prompts it learns to give
answers of asked-for scores. It answers the other half, and from the best of those answers for directions drawn at
random the first conditioned policy, t1, learns. From then on each policy answers the half the next one learns from.
Every policy is trained anew from the start policy.
"""

import gc
import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_align import processes, runs, want
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta, total
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.peft_format import Adapter
from lora_align.console import Screen, count, library_log, table
from lora_align.data import shards, sources
from lora_align.data.rows import Conversation, Message, Rated, with_system_prompt
from lora_align.model import base as bases
from lora_align.model.decoding import Sampling
from lora_align.model.endpoint import Endpoint
from lora_align.model.sampler import Sampler
from lora_align.policy import start as start_policy
from lora_align.rankers import SCORE
from lora_align.recipe import Recipe
from lora_align.rsf import finetune, inputs, sampling_requests
from lora_align.rsf.candidates import Request, SamplerAndJudge, candidates_of, collect_candidates
from lora_align.rsf.finetune import Examples
from lora_align.rsf.inputs import STEERLM, RsfInputs
from lora_align.rsf.selection import choose, fell, glimpse, spread
from lora_align.runs import LOG, Manifest, Run
from lora_align.train import checkpoints, lora_trainer

NAME = "policy"
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
    """Train and publish what is not there yet of the SteerLM-style policy and the iterations."""
    recipe.check_trains("rsf")
    assert recipe.rsf is not None
    lora_trainer.check_trackers(recipe.rsf)
    sampling_requests.check(recipe.rsf)
    folder = runs_dir / "rsf" / (name or NAME)
    labels = [STEERLM, *(f"t{t}" for t in range(1, recipe.rsf.iterations + 1))]
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    reward = inputs.reward_run(recipe.rsf, base, runs_dir)
    answers = inputs.answers_of(recipe.rsf, base)
    for warning in sources.unread_warnings(answers.unread):
        screen.warn(f"rsf: {warning}")
    done: dict[str, Run] = {}
    for label in labels if not force else ():
        if runs.is_run(folder / label):
            teacher = done.get(inputs.teacher_of(label))
            done[label] = inputs.made_alike(folder / label, recipe, base, start, reward, answers.fingerprint, teacher)
    # each policy is loaded under its own name
    server = Endpoint.at(endpoint, NAME, template=recipe.base.chat_template_kwargs) if endpoint else None
    if server:  # one that cannot load adapters is refused before anything is trained
        server.load_adapter(reward.path, reward.path.name, recipe)
    plan = RsfInputs(recipe, recipe.rsf, base, start, reward, answers, folder, force, server)
    for label in labels:
        if label in done:
            screen.note(f"{folder / label} is published already")
        elif label == STEERLM:
            done[label] = _train_steerlm(plan, screen)
        else:
            done[label] = _train_iteration(plan, int(label[1:]), done, screen)
    return [done[label] for label in labels]


def summary(made: Sequence[Run], runs_dir: Path) -> str:
    """A table of the iterations: what the answers drawn for each were worth, and those kept of them."""
    newest = made[-1]
    found = {run.path.name: run.manifest.metrics["collected"] for run in made if "collected" in run.manifest.metrics}
    shown = list(next(iter(found.values()))["kept_mean"])
    columns = ["policy", "answers", "kept", "value drawn", "value kept", *shown]
    rows = [
        [label, f"{of['answers']:,}", f"{of['kept']:,}", f"{of['drawn_value']:.1f}", f"{of['kept_value']:.1f}"]
        + [f"{of['kept_mean'][name]:.1f}" for name in shown]
        for label, of in found.items()
    ]
    command = runs.command(f"chat --want {_example(newest)}", runs_dir)
    return "\n".join([table(columns, rows), f"{newest.path}  {command}"])


def _example(run: Run) -> str:
    """The middle of the region it was trained on, as a person would type it."""
    region = run.manifest.recipe["rsf"]["directions"]
    middle = {name: (low + high) / 2 for name, (low, high) in region.items()}
    shown = want.Want.of(middle) if any(middle.values()) else want.sample_direction(region, random.Random(0))
    return ",".join(f"{name}={weight:.1f}" for name, weight in shown.weights.items())


# --- the policies ---


def _train_steerlm(plan: RsfInputs, screen: Screen) -> Run:
    """Learns answers of the second half, each under a system message that asks for its own scores."""
    settings, target = plan.settings, plan.folder / STEERLM
    with runs.staging_folder(target, screen, force=plan.force) as staging, library_log(staging / LOG):
        rows = plan.answers.halves[1]
        scores = _scores(plan, rows, screen)
        sound = [i for i, score in enumerate(scores) if all(map(math.isfinite, score.values()))]
        rows, scores = [rows[i] for i in sound], [scores[i] for i in sound]
        targets = [{name: score[name] for name in settings.directions} for score in scores]
        learned: Examples = []
        for row, target_scores in zip(rows, targets, strict=True):
            asked = with_system_prompt(want.scores_prompt(target_scores, settings.steer), row.prompt)
            learned.append((row.prompt, Conversation((*asked, Message("assistant", row.answer)))))
        facts = finetune.finetune_supervised(plan, learned, STEERLM, staging, screen)
        watched = [score[settings.watch] for score in scores if settings.watch in score]
        if len(watched) > 1:
            facts["metrics"]["watched"] = spread(watched)
        (staging / SCORES).write_text(json.dumps(targets))
        data = {"rows": len(rows), "score not finite": len(plan.answers.halves[1]) - len(rows)}
        about = _about(plan, data, settings.steer, None)
        return _published(staging, target, replace(about, **facts), screen)


def _scores(plan: RsfInputs, rows: Sequence[Rated], screen: Screen) -> list[Mapping[str, float]]:
    """What each answer is worth by objective: as `score` has written beside it, or as the judge says now."""
    known: list[Mapping[str, float]] = [
        {name.removeprefix(SCORE): value for name, value in row.ratings.items() if name.startswith(SCORE)}
        for row in rows
    ]
    left = [i for i, score in enumerate(known) if not plan.settings.directions.keys() <= score.keys()]
    if len(left) < len(rows):
        screen.note(f"{STEERLM}: {len(rows) - len(left):,} of {count(len(rows), 'answer')} with scores of their own")
    if left:
        panel, mine = (
            SamplerAndJudge(plan.base, plan.reward, budgets=plan.budgets),
            left[processes.rank() :: processes.world_size()],
        )
        with screen.progress(f"{STEERLM} scores", len(mine)) as progress:
            said = [(rows[i].prompt, rows[i].answer) for i in mine]
            points = panel.score(said, lambda count: progress.show(count, {})).tolist()
        for places, found in processes.all_gather((mine, points)):
            for i, values in zip(places, found, strict=True):
                known[i] = dict(zip(panel.judge.objectives, values, strict=True))
        del panel
        gc.collect()  # the next thing loaded is the base again, to train
    return known


def _train_iteration(plan: RsfInputs, t: int, done: Mapping[str, Run], screen: Screen) -> Run:
    """Draw answers of the policy before, judge them, choose, and learn anew from the start policy."""
    settings, label = plan.settings, f"t{t}"
    teacher = done[inputs.teacher_of(label)]
    target, parts = plan.folder / label, plan.folder / f".{label}.samples"
    half = plan.answers.halves[(t - 1) % 2]
    prompts = sampling_requests.prompts(settings, half, t)
    if t == 1:
        requests = sampling_requests.for_scores(settings, prompts, json.loads((teacher.path / SCORES).read_text()))
    else:
        requests = sampling_requests.for_directions(settings, prompts, t)
    with runs.staging_folder(target, screen, force=plan.force) as staging, library_log(staging / LOG):
        if plan.force:
            processes.on_rank_0(lambda: shutil.rmtree(parts, ignore_errors=True))
        with shards.opened(parts) as store:
            drawn_by = {f"rsf.{key}": of for key, of in asdict(settings).items() if key not in checkpoints.FREE}
            made_of = {"teacher": teacher.manifest.files, "data": plan.answers.fingerprint}
            shards.check_settings(parts, {**made_of, **drawn_by})
            _draw(plan, teacher, requests, t, store, screen, f"{label} draws")
            candidates = candidates_of(store.rows())
            shards.write(list(store.rows()), staging / SAMPLES)
        chosen = choose(sampling_requests.wanted_pools(settings, requests, candidates, t), settings.watch)
        replayed = finetune.replayed(settings, half, len(chosen.choices), t) if settings.learn == "sft" else []
        if settings.learn == "dpo":
            facts = finetune.finetune_dpo(plan, chosen.choices, label, staging, screen)
        else:
            learned = [sampling_requests.best(settings, choice) for choice in chosen.choices]
            facts = finetune.finetune_supervised(plan, [*learned, *replayed], label, staging, screen)
        facts["metrics"] |= {"collected": chosen.figures, "watched": chosen.figures.pop("watched", None)}
        about = _about(plan, {"rows": len(chosen.choices), "replayed": len(replayed)}, "", teacher)
        published = _published(staging, target, replace(about, **facts), screen)
    processes.on_rank_0(lambda: shutil.rmtree(parts))
    _watch(published, {teacher.path.name: teacher, STEERLM: done[STEERLM]}, settings.watch, screen)
    return published


def _watch(made: Run, others: Mapping[str, Run], watched: str, screen: Screen) -> None:
    """Name a fall since the policy before, and one since the first that steps too small to be named add up to."""
    now = made.manifest.metrics.get("watched")
    for label, run in others.items():
        before = run.manifest.metrics.get("watched")
        if before and now and fell(before, now):
            screen.warn(
                f"{made.path.name}: {watched} of what it learned fell from {before['mean']:.1f} ({label}) to "
                f"{now['mean']:.1f}; what the reward model does not weigh, the policy may lose"
            )
            return


def _published(staging: Path, target: Path, manifest: Manifest, screen: Screen) -> Run:
    run = runs.publish(staging, target, manifest)
    shutil.rmtree(checkpoints.beside(target), ignore_errors=True)
    lora_trainer.warn_unconverged(run, screen)
    return run


def _about(plan: RsfInputs, data: Mapping[str, Any], steer: str, teacher: Run | None) -> Manifest:
    settings = plan.settings
    return Manifest(
        stage="rsf",
        base=plan.base.identity,
        recipe=plan.recipe.as_dict(),
        start=start_policy.identity(plan.start),
        seeds={"init": plan.lora.init_seed, "data": settings.seed},
        data={
            "source": sources.name(settings),
            "fingerprint": plan.answers.fingerprint,
            "dropped": dict(plan.answers.dropped),
            **data,
        },
        method={
            "objectives": list(settings.directions),
            "ask": settings.ask,
            "steer": steer,
            "reward": dict(plan.reward.manifest.files),
            "teacher": dict(teacher.manifest.files) if teacher else {},
        },
    )


# --- drawing ---


def _draw(
    plan: RsfInputs, teacher: Run, requests: Sequence[Request], t: int, store: shards.Shards, screen: Screen, label: str
) -> None:
    """With the policy before, here or on a server; the judge is always here."""
    settings = plan.settings
    n = sampling_requests.each(settings, t)
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed + t)
    panel = SamplerAndJudge(plan.base, plan.reward, plan.start, None if plan.server else teacher, plan.budgets)
    sampler: Sampler = panel
    if plan.server:
        adapter = processes.on_rank_0(lambda: _whole(plan, teacher, store.folder))
        sampler = plan.server.load_adapter(adapter, teacher.path.name, plan.recipe)

    def figures(batch: Sequence[Request], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        return glimpse(sampling_requests.wanted_pools(settings, batch, candidates_of(rows), t))

    collect_candidates(requests, n, sampling, sampler, panel, store, screen, label, figures)
    del panel, sampler
    gc.collect()  # the next thing loaded is the base again, to train


def _whole(plan: RsfInputs, policy: Run, folder: Path) -> Path:
    """The adapter a server needs: the policy's, and the start adapter's with it."""
    if plan.start is None:
        return policy.path
    adapters = [Adapter(run.path, whole=True) for run in (plan.start, policy)]
    both = total([LoraDelta.of(adapter) for adapter in adapters])
    about = BaseInfo.common([adapter.config for adapter in adapters])
    peft_format.save(folder / "adapter", both.items(), list(both), about)
    return folder / "adapter"

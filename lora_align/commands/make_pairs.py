"""The command `pairs`: sample a described preference's pairs, with one system prompt for each side."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_align import described_pairs, distributed, run_writer, runs
from lora_align.commands.pair_filters import SIDES, MadePair, Task, agreed, is_url, pair_up, scoring_judge
from lora_align.console import Screen, count
from lora_align.data import row_reader, shards, sources
from lora_align.data.files import EVERYDAY
from lora_align.data.pairs import reasons
from lora_align.data.rows import Prompt, prompt_key
from lora_align.data.shards import KEY
from lora_align.errors import RunFailedError, UserError
from lora_align.metrics import intervals
from lora_align.model import base as bases
from lora_align.model.endpoint import Endpoint
from lora_align.model.logprobs import TOKENS, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import SampledText, Sampler, Sampling
from lora_align.policy import start_policy
from lora_align.policy.policy import START_POLICY
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Preference, Recipe, Source
from lora_align.runs import Manifest, Run

BATCH = 256  # answers in a file of answers; a kill loses at most the answers of the file being written
LONGER = 1.25  # ratio of mean lengths from which the difference is reported
FEWEST = 8  # pairs without which nothing is published
COMPARED = 32  # pairs on which the descriptions' effect is measured


def make_missing(recipe: Recipe, names: Sequence[str], runs_dir: Path, screen: Screen) -> Recipe:
    """Make the pairs of described preferences that have none, and return the recipe with the pairs' files as data."""
    for name in described_pairs.missing(recipe, names, runs_dir):
        if distributed.world_size() > 1:
            raise UserError(f"preferences.{name}: make its pairs first with `lora-align pairs --pref {name}`")
        screen.note(summary(make_pairs(recipe, name, runs_dir, screen)))
    return described_pairs.attach(recipe, runs_dir)


def make_pairs(
    recipe: Recipe, name: str, runs_dir: Path, screen: Screen, *, server: Endpoint | None = None, force: bool = False
) -> Run:
    """Sample, filter and publish the pairs of a described preference. The same call continues after a stop."""
    preference, target = recipe.preference(name), described_pairs.folder(name, runs_dir)
    if not preference.described:
        raise UserError(f"preferences.{name} has no description; add `more` and `less`, as in more = 'Be warm.'")
    run_writer.refuse_before_training(target, force=force, resume=False, remedy="--runs DIR keeps both")
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    if not server and not base.chat.takes_system:
        raise UserError(
            f"preferences.{name}: the chat template of {recipe.base.model} takes no system message, so its answers "
            "cannot follow a description; sample from another model with --endpoint, or set base.chat_template"
        )
    tasks = read_tasks(preference)
    scoring = scoring_judge(preference, base, recipe, runs_dir)
    judge_server = Endpoint.at(preference.judge, options=("judge", "judge")) if is_url(preference.judge) else None
    policies = PolicySet.of([START_POLICY], recipe, base, runs_dir, screen, scoring)
    sampler: Sampler = server or policies.sampler_of(START_POLICY)
    settings = described_pairs.settings(recipe, name)
    model = {"server": server.url, "model": server.model} if server else policies.lineage(START_POLICY)
    work = target.with_name(f".{name}.parts")
    if force:
        shards.delete(work)
    with run_writer.staging_folder(target, screen, force=force) as staging:
        with shards.opened(work) as parts:
            known = {"model": server.model} if server else model  # the same model may be served at another address
            sampled = {described_pairs.STAGE: asdict(recipe.pairs), "model": known}
            shards.check_settings(work, sampled, "--force starts again")
            answers = sample_answers(tasks, sampler, recipe, parts, screen, name)
            dropped: Counter[str] = Counter()
            pairs = [pair for task in tasks for pair in pair_up(task, answers[task.key], preference, dropped)]
            if preference.judge:
                reader = judge_server or policies.sampler_of(START_POLICY)
                pairs = agreed(pairs, preference, policies, reader, dropped, screen)
            _refuse_too_few(pairs, tasks, dropped, name)
            metrics = {**lengths(pairs), **({} if server else {"effect": effect(pairs, policies)})}
            shards.write([pair.as_row() for pair in pairs], staging / described_pairs.FILE)
            run = run_writer.publish(
                staging,
                target,
                Manifest(
                    stage=described_pairs.STAGE,
                    base=base.identity,
                    recipe=recipe.as_dict(),
                    preference=name,
                    start=start_policy.identity(policies.start),
                    seeds={"sampling": recipe.pairs.seed},
                    data={
                        "source": preference.prompts or EVERYDAY.stem,
                        "prompts": len(tasks),
                        "pairs": len(pairs),
                        "cut": sum(not one.ended for of in answers.values() for some in of.values() for one in some),
                        "dropped": dict(dropped),
                    },
                    method={"settings": settings, "model": model},
                    metrics=metrics,
                ),
            )
        shards.delete(work)
    for warning in warnings(run, preference):
        screen.warn(f"{run.path}: {warning}")
    return run


def summary(run: Run) -> str:
    """Return a line about the pairs."""
    data, metrics = run.manifest.data, run.manifest.metrics
    words = f"{metrics['chosen words']:.0f} words chosen, {metrics['rejected words']:.0f} rejected"
    dropped = f"; dropped {reasons(Counter(data['dropped']))}" if data["dropped"] else ""
    cut = (
        f"; {count(data['cut'], 'answer')} cut at the last sentence within pairs.max_new_tokens" if data["cut"] else ""
    )
    return f"{run.path}  {count(data['pairs'], 'pair')} from {count(data['prompts'], 'prompt')}; {words}{cut}{dropped}"


def warnings(run: Run, preference: Preference) -> Iterator[str]:
    """Yield the reasons to doubt the pairs: one side is longer, or the descriptions make no difference."""
    metrics = run.manifest.metrics
    ratio = metrics["chosen words"] / max(metrics["rejected words"], 1)
    side = "chosen" if ratio > 1 else "rejected"
    if max(ratio, 1 / max(ratio, 1e-9)) > LONGER:
        larger, smaller = sorted((metrics["chosen words"], metrics["rejected words"]), reverse=True)
        remedy = "" if preference.match_length else "; match_length = true pairs answers of similar length"
        yield f"the {side} answers are longer ({larger:.0f} words, the others {smaller:.0f}){remedy}"
    effect = metrics.get("effect")
    if effect and effect["low"] <= 0:
        yield (
            f"the descriptions hardly change the answers ({effect['value']:.2f} nats for each answer, interval "
            f"{effect['low']:.2f} to {effect['high']:.2f}); write clearer ones, or use a larger model with --endpoint"
        )


# --- the steps ---


def read_tasks(preference: Preference) -> list[Task]:
    """Return distinct prompts, each with the descriptions that it is answered under."""
    source: Source = replace(preference, data=preference.prompts or str(EVERYDAY))
    distinct: dict[str, Prompt] = {}
    for _, prompt in sources.read(source, row_reader.prompt, Counter()):
        distinct.setdefault(prompt_key(prompt), prompt)
        if len(distinct) == preference.limit:
            break
    if not distinct:
        raise UserError(f"{source.data}: no prompts; check the file")
    more, less = (_listed(texts) for texts in (preference.more, preference.less))
    return [
        Task(prompt, {"more": more[place % len(more)], "less": less[place % len(less)]})
        for place, prompt in enumerate(distinct.values())
    ]


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts or [""]


def sample_answers(
    tasks: Sequence[Task], sampler: Sampler, recipe: Recipe, parts: shards.Shards, screen: Screen, name: str
) -> dict[str, dict[str, list[SampledText]]]:
    """Return the answers to each task by side: those in `parts`, and the missing ones, which are sampled and stored."""
    settings = recipe.pairs
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    fitting = [task for task in tasks if all(sampler.fits(task.asked(side)) for side in SIDES)]
    if not fitting:
        raise UserError(f"preferences.{name}: every prompt fills the context; shorten the prompts")

    def answer(some: Sequence[Task], done: Callable[[int], None]) -> list[dict[str, Any]]:
        asked = [(task, side) for task in some for side in SIDES]
        rows: list[dict[str, Any]] = []
        for batch in sampler.draw([task.asked(side) for task, side in asked], settings.samples, sampling):
            for one in batch:
                task, side = asked[one.prompt]
                rows.append({KEY: task.key, "side": side, "number": one.number, "text": one.text, "ended": one.ended})
            done(len(rows) // (2 * settings.samples))
        return rows

    parts.fill(fitting, max(1, BATCH // (2 * settings.samples)), answer, screen, f"pairs of {name}")
    answers: dict[str, dict[str, list[SampledText]]] = {task.key: {side: [] for side in SIDES} for task in tasks}
    wanted = (row for row in parts.rows() if row[KEY] in answers)  # others are of an earlier description
    for row in sorted(wanted, key=lambda row: int(row["number"])):
        answers[row[KEY]][row["side"]].append(SampledText(0, row["number"], row["text"], row["ended"]))
    return answers


def _refuse_too_few(pairs: Sequence[MadePair], tasks: Sequence[Task], dropped: Counter[str], name: str) -> None:
    if len(pairs) < FEWEST:
        remedies = {
            "unfinished answer": "raise pairs.max_new_tokens",
            "equal answers": "write descriptions that differ more",
            "the judge disagrees": "write clearer descriptions, or choose another judge",
            "lengths differ": "raise pairs.samples, so that match_length has a choice",
        }
        most = dropped.most_common(1)[0][0] if dropped else ""
        raise RunFailedError(
            f"preferences.{name}: only {count(len(pairs), 'pair')} from {count(len(tasks), 'prompt')} "
            f"(dropped {reasons(dropped) or 'none'}); {remedies.get(most, 'give more prompts')}"
        )


# --- what is reported ---


def lengths(pairs: Sequence[MadePair]) -> dict[str, float]:
    """Return the mean numbers of words of both sides."""
    words = [(len(made.pair.chosen.split()), len(made.pair.rejected.split())) for made in pairs]
    return {"chosen words": fmean(of[0] for of in words), "rejected words": fmean(of[1] for of in words)}


def effect(pairs: Sequence[MadePair], policies: PolicySet) -> dict[str, float]:
    """Return by how many nats an answer is more likely under its own description than under the other, with interval.

    The value is the mean over both answers of COMPARED pairs at most. It is about 0 if the model ignores descriptions.
    """
    policies.activate(START_POLICY)
    chat, longest = policies.base.chat, policies.base.max_length
    rows = []
    for made in pairs[:COMPARED]:
        for text, (own, other) in ((made.pair.chosen, SIDES), (made.pair.rejected, SIDES[::-1])):
            for side in (own, other):
                ids, (answer,) = chat.answered(made.task.asked(side), [text])
                rows.append((ids, [answer[: max(1, longest - len(ids))]]))
    sums = answer_logprobs(policies.model, rows, MemoryBudget(TOKENS)).view(-1, 2)
    ratios = (sums[:, 0] - sums[:, 1]).tolist()
    estimate = intervals.mean(ratios, [place // 2 for place in range(len(ratios))])
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}

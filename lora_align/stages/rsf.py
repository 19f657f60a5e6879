"""One policy that is asked for a direction: iterated rejection sampling from the start policy (arXiv 2402.18571).

A SteerLM-style policy learns, on one half of the prompts, to give answers of asked-for scores, and answers the other
half; from the best of those for directions drawn at random the first conditioned policy, t0, learns. From then on
each policy answers the half the next one learns from. Every policy is trained anew from the start policy.
"""

import gc
import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_align import runs, want
from lora_align.adapters import merge, peft_format
from lora_align.console import Screen, library_log, table
from lora_align.data import shards, sources
from lora_align.data.pairs import is_held_out
from lora_align.data.rows import Conversation, Pair, Prompt, prompt_key, under_system
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.endpoint import Endpoint
from lora_align.model.generate import Sampling
from lora_align.model.reward_model import Heads
from lora_align.model.sampler import Sampler
from lora_align.preference import Direction
from lora_align.recipe import Dpo, Lora, Recipe, Rsf, Training
from lora_align.runs import LOG, Manifest, Run
from lora_align.stages import asking, dpo, sft
from lora_align.stages import start as start_policy
from lora_align.stages.collect import Panel, Request, collect, read
from lora_align.stages.select import Choice, choose, fell, spread

NAME, STEERLM = "policy", "steerlm"
SAMPLES, SCORES = "samples.parquet", "scores.json"
Learned = list[tuple[Prompt, Conversation]]  # a prompt as it was read, and the conversation to learn from


@dataclass(frozen=True)
class Plan:
    """What every policy of a series has in common."""

    recipe: Recipe
    settings: Rsf
    base: Base
    start: Run | None
    reward: Run
    halves: tuple[list[Conversation], list[Conversation]]
    dropped: Mapping[str, int]
    folder: Path
    force: bool
    server: Endpoint | None

    @property
    def lora(self) -> Lora:
        """The shape of the policies' adapters."""
        return self.settings.lora or self.recipe.lora


def run(
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
    endpoint: str | None = None,
) -> list[Run]:
    """Train and publish what is not there yet of the SteerLM-style policy and the iterations."""
    if recipe.rsf is None:
        raise UserError("the recipe has no [rsf] table: it names prompts, and bounds in [rsf.directions]")
    asking.check(recipe.rsf)
    folder = runs_dir / "rsf" / (name or NAME)
    labels = [STEERLM, *(f"t{t}" for t in range(recipe.rsf.iterations + 1))]
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    reward = _reward_run(recipe.rsf, base, runs_dir)
    done = {} if force else {at: _made_alike(folder / at, recipe, reward) for at in labels if runs.is_run(folder / at)}
    server = Endpoint.at(endpoint, NAME) if endpoint else None  # each policy is loaded under its own name
    if server:  # one that cannot load adapters is refused before anything is trained
        server.load_adapter(reward.path, reward.path.name, recipe)
    halves, dropped = _halves(recipe.rsf, base)
    plan = Plan(recipe, recipe.rsf, base, start, reward, halves, dropped, folder, force, server)
    for label in labels:
        if label in done:
            screen.note(f"{folder / label} was made before")
        elif label == STEERLM:
            done[label] = _steerlm(plan, screen)
        else:
            done[label] = _iteration(plan, int(label[1:]), done, screen)
    return [done[label] for label in labels]


def told(made: Sequence[Run]) -> str:
    """A table of the iterations: what the answers drawn for each were worth, and those kept of them."""
    found = {run.path.name: run.manifest.metrics["collected"] for run in made if "collected" in run.manifest.metrics}
    shown = list(next(iter(found.values()))["kept_mean"])
    columns = ["policy", "answers", "kept", "value drawn", "value kept", *shown]
    rows = [
        [label, f"{of['answers']:,}", f"{of['kept']:,}", f"{of['drawn_value']:.1f}", f"{of['kept_value']:.1f}"]
        + [f"{of['kept_mean'][name]:.1f}" for name in shown]
        for label, of in found.items()
    ]
    return "\n".join([table(columns, rows), f"{made[-1].path}  lora-align chat --want {_example(made[-1])}"])


def _example(run: Run) -> str:
    """The middle of the region it was trained on, as a person would type it."""
    region = run.manifest.recipe["rsf"]["directions"]
    middle = want.Want.of({name: (low + high) / 2 for name, (low, high) in region.items()})
    return ",".join(f"{name}={weight:.1f}" for name, weight in middle.weights.items())


# --- what is needed ---


def _made_alike(folder: Path, recipe: Recipe, reward: Run) -> Run:
    """A published policy of this series, if it was made with the same settings; more iterations may follow it."""
    run = runs.read(folder)
    before, now = (
        {**r["rsf"], "iterations": 0} for r in (run.manifest.recipe, json.loads(json.dumps(recipe.as_dict())))
    )
    changed = [f"rsf.{key}" for key in now if before.get(key) != now[key]]
    changed += ["reward model"] if run.manifest.method["reward"] != reward.manifest.files else []
    if changed:
        raise UserError(
            f"{folder} was made with another {changed[0]}; --name NEW keeps both, --force moves the old one aside"
        )
    return run


def _reward_run(settings: Rsf, base: Base, runs_dir: Path) -> Run:
    """The reward model, if it judges what directions are made of."""
    folder = runs_dir / "reward" / settings.reward
    if not runs.is_run(folder):
        raise UserError(f"no reward model {settings.reward!r} in {runs_dir}/reward: run `lora-align reward`")
    run = runs.read(folder)
    if run.fingerprint != base.fingerprint:
        raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")
    known = [*Heads.load(run.path).names, *run.manifest.method["objectives"]]
    for name in settings.directions:
        if name not in known:
            raise UserError(f"rsf.directions.{name}: {run.path} has no such objective (it has: {', '.join(known)})")
    return run


def _halves(settings: Rsf, base: Base) -> tuple[tuple[list[Conversation], list[Conversation]], dict[str, int]]:
    """Conversations in two halves that share no prompt, as its text decides; and what was dropped, by reason."""
    halves: tuple[list[Conversation], list[Conversation]] = ([], [])
    dropped: Counter[str] = Counter()
    prompts: set[str] = set()
    longest = min(settings.max_length, base.max_length)
    longest_ask = max(sorted(asking.examples(settings)), key=len)
    for where, row in sources.rows(settings.data, settings.split, settings.revision):
        for found in sources.answered(row, where):
            prompt, answer = found.messages[:-1], found.messages[-1].content
            if not answer.strip():
                dropped["empty answer"] += 1
            elif len(base.chat.prompt_ids(under_system(longest_ask, prompt))) >= longest:
                dropped["prompt too long"] += 1
            else:
                key = prompt_key(prompt)
                prompts.add(key)
                halves[int(key[-1], 16) % 2].append(found)  # the first digits say what is held out
        if settings.limit and len(prompts) >= settings.limit:
            break
    if not all(halves):
        raise UserError(f"{settings.data}: too few prompts for two halves ({len(prompts)}; dropped: {dict(dropped)})")
    return halves, dict(dropped)


# --- the policies ---


def _steerlm(plan: Plan, screen: Screen) -> Run:
    """Learns answers of the second half, each under a system message that asks for its own scores."""
    settings, target = plan.settings, plan.folder / STEERLM
    with runs.claim(target, screen, force=plan.force) as staging, library_log(staging / LOG):
        rows = plan.halves[1]
        said = [(row.messages[:-1], row.messages[-1].content) for row in rows]
        judge = Panel(plan.base, plan.reward)
        points = judge.score(said).tolist()
        rewards = [dict(zip(judge.judge.objectives, row, strict=True)) for row in points]
        del judge
        scores = [{name: reward[name] for name in settings.directions} for reward in rewards]
        learned: Learned = []
        for row, score in zip(rows, scores, strict=True):
            prompt = row.messages[:-1]
            asked = under_system(want.scores_asked(score, settings.steer), prompt)
            learned.append((prompt, Conversation((*asked, row.messages[-1]))))
        facts = _learn(plan, learned, STEERLM, staging, screen)
        if settings.watch in rewards[0]:
            facts["metrics"]["watched"] = spread([reward[settings.watch] for reward in rewards])
        (staging / SCORES).write_text(json.dumps(scores))
        about = _about(plan, {"rows": len(rows)}, settings.steer)
        return runs.publish(staging, target, replace(about, **facts))


def _iteration(plan: Plan, t: int, done: Mapping[str, Run], screen: Screen) -> Run:
    """Draw answers of the policy before, judge them, choose, and learn anew from the start policy."""
    settings, label, teacher = plan.settings, f"t{t}", done[STEERLM if t == 0 else f"t{t - 1}"]
    target, parts = plan.folder / label, plan.folder / f".{label}.samples"
    half = plan.halves[t % 2]
    prompts = asking.prompts(settings, half, t)
    if t == 0:
        requests = asking.for_scores(settings, prompts, json.loads((teacher.path / SCORES).read_text()))
    else:
        requests = asking.for_directions(settings, prompts, t)
    with runs.claim(target, screen, force=plan.force) as staging, library_log(staging / LOG):
        with shards.opened(parts) as store:
            shards.same_work(parts, {"teacher": teacher.manifest.files, "rsf": asdict(settings)})
            _draw(plan, teacher, requests, t, store, screen, f"{label} draws")
            candidates = read(store)
            shards.write(list(store.rows()), staging / SAMPLES)
        if t < settings.pooled:  # who does not obey yet may have said just what somebody else wants
            asked = asking.pooled(settings, requests, candidates, t)
        else:
            asked = [(of.prompt, of.want, candidates[of.key]) for of in requests if of.want]
        chosen = choose(asked, settings.watch)
        replayed = _replayed(settings, half, len(chosen.choices), t) if settings.learn == "sft" else []
        if settings.learn == "dpo":
            facts = _prefer(plan, chosen.choices, label, staging, screen)
        else:
            learned = [asking.best(settings, choice) for choice in chosen.choices]
            facts = _learn(plan, [*learned, *replayed], label, staging, screen)
        facts["metrics"] |= {"collected": chosen.figures, "watched": chosen.figures.pop("watched", None)}
        about = _about(plan, {"rows": len(chosen.choices), "replayed": len(replayed)}, "")
        published = runs.publish(staging, target, replace(about, **facts))
    shutil.rmtree(parts)
    before, now = (of.manifest.metrics.get("watched") for of in (teacher, published))
    if before and now and fell(before, now):
        screen.warn(
            f"{label}: {settings.watch} of what it learned fell from {before['mean']:.1f} to {now['mean']:.1f}; "
            "what the reward model does not weigh, the policy may lose"
        )
    return published


def _about(plan: Plan, data: Mapping[str, Any], steer: str) -> Manifest:
    settings = plan.settings
    return Manifest(
        stage="rsf",
        base=plan.base.identity,
        recipe=plan.recipe.as_dict(),
        start=start_policy.identity(plan.start),
        seeds={"init": plan.lora.init_seed, "data": settings.seed},
        data={"source": settings.data, "dropped": dict(plan.dropped), **data},
        method={
            "objectives": list(settings.directions),
            "ask": settings.ask,
            "steer": steer,
            "reward": dict(plan.reward.manifest.files),
        },
    )


# --- drawing ---


def _draw(
    plan: Plan, teacher: Run, requests: Sequence[Request], t: int, store: shards.Shards, screen: Screen, label: str
) -> None:
    """With the policy before, here or on a server; the judge is always here."""
    settings = plan.settings
    n = settings.samples if t else max(1, settings.bootstrap // settings.per_prompt)
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed + t)
    panel = Panel(plan.base, plan.reward, plan.start, None if plan.server else teacher)
    sampler: Sampler = panel
    if plan.server:
        sampler = plan.server.load_adapter(_whole(plan, teacher, store.folder), teacher.path.name, plan.recipe)
    collect(requests, n, sampling, sampler, panel, store, screen, label)
    del panel, sampler
    gc.collect()  # the next thing loaded is the base again, to train


def _whole(plan: Plan, policy: Run, folder: Path) -> Path:
    """The adapter a server needs: the policy's, and the start adapter's with it."""
    if plan.start is None:
        return policy.path
    parts = {run.path.name: peft_format.load(run.path) for run in (plan.start, policy)}
    config = peft_format.read_config(policy.path)
    endings = peft_format.common_endings([plan.start.path, policy.path])
    both = merge.exact(parts, dict.fromkeys(parts, 1.0))
    out = folder / "adapter"
    out.mkdir(exist_ok=True)
    named, revision = config.get("base_model_name_or_path") or "", config.get("revision") or ""
    peft_format.save(both.delta, out, base=named, revision=revision, targets=endings)
    return out


# --- learning ---


def _replayed(settings: Rsf, half: Sequence[Conversation], beside: int, t: int) -> Learned:
    """Answers as they came, under no direction, so that they make up the recipe's share of the whole."""
    count = min(len(half), round(beside * settings.replay / (1 - settings.replay)))
    picked = random.Random(f"{settings.seed} replay {t}").sample(half, count)
    return [(row.messages[:-1], row) for row in picked]


def _learn(plan: Plan, learned: Learned, label: str, staging: Path, screen: Screen) -> dict[str, Any]:
    """Supervised, on the answers (or on all the text)."""
    settings = plan.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, plan.base.max_length)
    sides: tuple[list[tokenise.TokenText], list[tokenise.TokenText]] = ([], [])
    for prompt, conversation in learned:
        row = tokenise.text(conversation, plan.base.chat, longest, settings.loss_on == "answers", counts)
        if row is not None:
            sides[is_held_out(prompt, settings.held_out)].append(row)
    material = sft.Material(*sides, facts={})
    model = start_policy.load(plan.base, plan.start)
    return sft.train(model, plan.base, plan.lora, settings, material, label, staging, screen)


def _prefer(plan: Plan, choices: Sequence[Choice], label: str, staging: Path, screen: Screen) -> dict[str, Any]:
    """By DPO, the best answer over the worst, both behind what was asked."""
    settings = plan.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, plan.base.max_length)
    sides: tuple[list[tokenise.TokenPair], list[tokenise.TokenPair]] = ([], [])
    for choice in choices:
        pair = Pair(asking.as_asked(settings, choice), choice.best.text, choice.worst.text)
        row = None if pair.chosen == pair.rejected else tokenise.pair(pair, plan.base.chat, longest, counts)
        if row is not None:
            sides[is_held_out(choice.prompt, settings.held_out)].append(row)
    model = start_policy.load(plan.base, plan.start)
    shared = {field.name: getattr(settings, field.name) for field in fields(Training)}
    recipe = replace(plan.recipe, lora=plan.lora, dpo=Dpo(**shared, beta=settings.beta))
    material = dpo.Material(*sides, facts={})
    material = material.referenced(model, 2 * settings.micro_batch_size, f"{label} reference", screen)
    facts, _ = dpo.train(model, plan.base, recipe, material, Direction.pos, label, staging, screen)
    return facts

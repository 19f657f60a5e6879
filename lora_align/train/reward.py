"""The reward model: k heads on one frozen 4-bit backbone with LoRA, from ratings, from pairs, or from both."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from lora_align import runs
from lora_align.console import Screen, count, library_log
from lora_align.errors import UserError
from lora_align.metrics import plots
from lora_align.model import base as bases
from lora_align.model.base import Base, base_model_of
from lora_align.model.fsdp import is_sharded
from lora_align.model.logprobs import Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.model.tokenise import TokenPair, TokenRated
from lora_align.recipe import Recipe, Reward
from lora_align.runs import LOG, Manifest, Run
from lora_align.train import checkpoints, lora_trainer, reward_loss
from lora_align.train import token_rows as materials
from lora_align.train.checkpoints import Unfinished
from lora_align.train.reward_loss import Example, RewardLoss
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import StepTrainer

NAME = "reward"
UNRATED = (50.0, 25.0)  # mean and deviation, in points, of a head that learns from pairs alone
MEASURED_AT_ONCE = 32


@dataclass(frozen=True)
class Material:
    """Examples of all sources, the heads they teach (mean and deviation of the points), and what a manifest says."""

    heads: Mapping[str, tuple[float, float]]
    train: Sequence[Example]
    held_out: Sequence[Example]
    facts: dict[str, Any]


def train_reward_model(
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
    resume: bool = False,
) -> Run:
    """Train and publish the reward model."""
    recipe.check_trains("reward")
    assert recipe.reward is not None
    lora_trainer.check_trackers(recipe.reward)
    target = runs_dir / "reward" / (name or NAME)
    runs.refuse_busy(target)
    if not resume:
        runs.refuse_existing(target, force)
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    material = prepare(recipe, recipe.reward, base, screen)
    data = {source: of["fingerprint"] for source, of in material.facts.items()}
    who = checkpoints.run_identity("reward", recipe, base, "", data)
    unfinished = Unfinished.of(target, who, resume=resume, force=force, screen=screen)
    if resume and (made := unfinished.published(target, screen)):
        return made
    about = Manifest(
        stage="reward",
        base=base.identity,
        recipe=recipe.as_dict(),
        seeds={"init": (recipe.reward.lora or recipe.lora).init_seed, "data": recipe.reward.seed},
        data=material.facts,
        method={"objectives": recipe.reward.objectives},
    )
    with runs.staging_folder(target, screen, force=force) as staging, library_log(staging / LOG):
        facts = train_heads(base, recipe, recipe.reward, material, staging, unfinished, screen)
        published = runs.publish(staging, target, replace(about, **facts))
        unfinished.clear()
    lora_trainer.warn_unconverged(published, screen)
    return published


def summary(run: Run) -> str:
    """A run in a few lines: what each head is worth on prompts it never saw."""
    heads = run.manifest.metrics["held_out"]["heads"]
    parts = [f"{name} {_worth(figures)}" for name, figures in heads.items()]
    return "\n".join([f"{run.path}  on held-out prompts:", *(f"  {part}" for part in parts)])


def _worth(figures: Mapping[str, Any]) -> str:
    measured = {"rated": ("Spearman", "spearman", "rating"), "pairs": ("accuracy", "accuracy", "pair")}
    said = [
        f"{called} {figures[name]:.2f} on {count(figures[number], what)}"
        if figures[number] >= reward_loss.ENOUGH
        else f"{count(figures[number], what)}: too few to judge"
        for number, (called, name, what) in measured.items()
        if figures[number]
    ]
    return ", ".join(said) or "nothing held out"


def load(base: Base, run: Run) -> RewardModel:
    """A published reward model, ready to score."""
    if run.manifest.stage != "reward":
        raise UserError(f"{run.path} is a run of {run.manifest.stage}, not a reward model")
    if run.fingerprint != base.fingerprint:
        raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")
    run.check_files()
    return RewardModel.load(base, run.path, run.manifest.method["objectives"])


# --- data ---


def prepare(recipe: Recipe, settings: Reward, base: Base, screen: Screen) -> Material:
    """Read every source, scale, split and tokenise; whatever is dropped or cut is counted."""
    facts: dict[str, Any] = {}
    rated = []
    for name, table in settings.ratings.items():
        answers = materials.read_token_ratings(
            table, base, settings.held_out, settings.limit, settings.max_length, screen
        )
        facts[f"ratings {name}"] = answers.facts
        rated.append((answers.train, answers.held_out))
    compared = {}
    for head, preference in settings.pairs.items():
        axis = recipe.preference(preference)
        pairs = materials.read_token_pairs(axis, base, settings.held_out, settings.limit, settings.max_length, screen)
        facts[f"pairs {head}"] = pairs.facts
        compared[head] = pairs.train, pairs.held_out
    for source, found in facts.items():
        materials.report_dropped(source, found, screen)
    heads = _heads(settings, (row for train, _ in rated for row in train))
    sides = [
        [
            *(_rated(of[side], tuple(heads)) for of in rated),
            *(_compared(of[side], len(heads), list(heads).index(head)) for head, of in compared.items()),
        ]
        for side in (0, 1)
    ]
    return Material(heads, concat(sides[0]), concat(sides[1]), facts)


def _rated(rows: Sequence[TokenRated], heads: Sequence[str]) -> LazyRows[Example]:
    def example(at: int) -> Example:
        row = rows[at]
        return Example(((row.prompt, row.answer),), tuple(row.ratings.get(name, math.nan) for name in heads))

    return LazyRows(len(rows), example)


def _compared(rows: Sequence[TokenPair], heads: int, head: int) -> LazyRows[Example]:
    def example(at: int) -> Example:
        row = rows[at]
        both = ((row.prompt, row.chosen), (row.prompt, row.rejected))
        return Example(both, (math.nan,) * heads, head)

    return LazyRows(len(rows), example)


def _heads(settings: Reward, rated: Iterable[TokenRated]) -> dict[str, tuple[float, float]]:
    """A head each attribute that was rated and each name under `pairs`; what is derived must be made of them."""
    given: dict[str, list[float]] = {}
    for row in rated:
        for name, points in row.ratings.items():
            if not math.isnan(points):
                given.setdefault(name, []).append(points)
    heads = {}
    for name, values in given.items():
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        heads[name] = (mean, deviation or 1.0)
    heads |= {name: UNRATED for name in settings.pairs if name not in heads}
    for name, parts in settings.objectives.items():
        unknown = [part for part in parts if part not in heads]
        if unknown or name in heads:
            what = f"no head {unknown[0]!r}" if unknown else "there is a head of that name"
            raise UserError(f"reward.objectives.{name}: {what} (heads: {', '.join(heads)})")
    return heads


# --- training ---


class SteppingTrainer(StepTrainer[Example], Trainer):
    """transformers' trainer, with steps made here."""


def train_heads(
    base: Base,
    recipe: Recipe,
    settings: Reward,
    material: Material,
    folder: Path,
    unfinished: Unfinished,
    screen: Screen,
) -> dict[str, Any]:
    """Train adapter and heads into a folder; the manifest's fields about them."""
    arguments = lora_trainer.arguments(settings, base, folder, NAME)
    del arguments["max_length"]  # TRL's; rows were cut already
    lora = settings.lora or recipe.lora
    with lora_trainer.accepted_by_libraries():
        model = base.load()
        reader = Reader.of(model)
        policy = get_peft_model(model, lora_trainer.fresh_adapter(lora, base))
        initial = lora_trainer.initialise(policy, lora.init_seed)
        means, deviations = ({name: pair[i] for name, pair in material.heads.items()} for i in (0, 1))
        # a part of the model, so that it is moved, clipped and optimised with the rest
        policy.heads = Heads(policy.config.hidden_size, means, deviations).to(bases.device())
        if settings.gradient_checkpointing:
            policy.enable_input_require_grads()
        trainer = SteppingTrainer(
            objective=RewardLoss(reader, policy.heads, settings.lm_weight, base.chat),
            rows=material.train,
            room=MemoryBudget(settings.tokens_per_batch, lora_trainer.TOO_LONG),
            unfinished=unfinished,
            tell=lambda text: screen.note(f"{NAME}: {text}"),
            model=policy,
            args=TrainingArguments(**arguments),
        )
    watch = lora_trainer.fit(trainer, settings, screen, NAME)
    lora_trainer.save_adapter(policy, folder)
    policy.heads.save(folder)
    judge = RewardModel(base, base_model_of(policy).eval(), policy.heads, settings.objectives)
    known = max(1, settings.tokens_per_batch // settings.max_length)  # a divided base cannot find out how many fit
    at_once = known if is_sharded(judge.model) else MEASURED_AT_ONCE
    report = reward_loss.measure_heads(judge, reward_loss.sample_held_out(material.held_out), MemoryBudget(at_once))
    lora_trainer.draw_curve(watch.history, NAME, folder / "curve.png")
    if material.held_out:
        plots.reward_report(folder / "held_out.png", report)
    figures = {"steps": trainer.state.global_step, "held_out": report, "seconds": round(watch.seconds, 1)}
    return {"initial_adapter": initial, "metrics": figures, "unconverged": reward_loss.unconverged(report)}

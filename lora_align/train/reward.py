"""The command `reward`: a reward model of k heads on a frozen 4-bit base with LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lora_align import runs
from lora_align.console import Screen, count
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.errors import UserError
from lora_align.metrics import plots
from lora_align.model import base as bases
from lora_align.model.base import Base, base_model_of
from lora_align.model.fsdp import is_sharded
from lora_align.model.logprobs import Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.model.tokenise import TokenPair, TokenRated
from lora_align.recipe import Lora, Recipe, Reward
from lora_align.runs import Manifest, Run
from lora_align.train import checkpoints, lora_trainer, reward_loss, token_rows
from lora_align.train.job import Job, Target
from lora_align.train.lora_trainer import Trained
from lora_align.train.reward_loss import Example, RewardLoss
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import StepInputs, StepTrainer

NAME = "reward"
UNRATED = (50.0, 25.0)  # mean and deviation, in points, of a head without ratings
MEASURE_BATCH = 32  # answers scored at once after training


@dataclass(frozen=True)
class RewardData:
    """Examples of all sources, the heads they train (mean and deviation of the ratings), and the manifest's facts."""

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
    settings = recipe.reward
    assert settings is not None
    lora_trainer.check_trackers(settings)
    target = Target(runs_dir / "reward" / (name or NAME), NAME, screen, force, resume)
    target.refuse_existing()
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    data = prepare(recipe, settings, base, screen)
    fingerprints = {source: facts["fingerprint"] for source, facts in data.facts.items()}
    saved = target.checkpoints(checkpoints.run_identity("reward", recipe, base, "", fingerprints))
    if run := target.find_published(saved):
        return run
    job = reward_job(settings, settings.lora or recipe.lora, data.heads, data.train, base)
    manifest = Manifest(
        stage="reward",
        base=base.identity,
        recipe=recipe.as_dict(),
        seeds={"init": job.lora.init_seed, "data": settings.seed},
        data=data.facts,
        method={"objectives": settings.objectives},
    )
    with target.staging_folder() as staging:
        trained = lora_trainer.train(job, base.load(), target, saved, staging)
        return target.publish(staging, measure(trained, manifest, settings, data.held_out, base, staging))


def reward_job(
    settings: Reward, lora: Lora, heads: Mapping[str, tuple[float, float]], examples: Sequence[Example], base: Base
) -> Job[Example]:
    """Return a job that trains heads, with these means and deviations, on examples."""

    def loss(model: PreTrainedModel, reader: Reader) -> RewardLoss:
        means, deviations = ({name: pair[i] for name, pair in heads.items()} for i in (0, 1))
        with torch.device(model.device):  # a plan's model may be on the meta device
            made = Heads(model.config.get_text_config().hidden_size, means, deviations)
        return RewardLoss(reader, made, settings.lm_weight, base.chat)

    return Job(base, settings, lora, examples, loss, _trainer)


def measure(
    trained: Trained[Example],
    manifest: Manifest,
    settings: Reward,
    held_out: Sequence[Example],
    base: Base,
    folder: Path,
) -> Manifest:
    """Save the heads, measure them on held-out examples, and return the manifest with all facts about the training."""
    heads = cast(RewardLoss, trained.loss).heads
    heads.save(folder)
    model = RewardModel(base, base_model_of(trained.policy).eval(), heads, settings.objectives)
    # with a sharded base the batch cannot be halved when memory runs out, so start with a size that fits
    batch = max(1, settings.tokens_per_batch // settings.max_length) if is_sharded(model.model) else MEASURE_BATCH
    report = reward_loss.measure_heads(model, reward_loss.sample_held_out(held_out), MemoryBudget(batch))
    if len(held_out) >= MIN_HELD_OUT:
        plots.reward_report(folder / "held_out.png", report)
    norm, relative_norm = lora_trainer.relative_size(trained.policy)
    metrics = {"norm": norm, "relative_norm": relative_norm, "held_out": report}
    reasons = lora_trainer.diverged_by_size(relative_norm) or reward_loss.unconverged(report)
    enough = all(max(head["rated"], head["pairs"]) >= MIN_HELD_OUT for head in report["heads"].values())
    return trained.describe(manifest, metrics, reasons, enough_held_out=enough)


def summary(run: Run) -> str:
    """Return a line about a run, and a line per head with its rank correlation and accuracy on held-out prompts."""
    heads = run.manifest.metrics["held_out"]["heads"]
    parts = [f"{name} {_quality(figures)}" for name, figures in heads.items()]
    return "\n".join([f"{run.path}  on held-out prompts:", *(f"  {part}" for part in parts)])


def _quality(figures: Mapping[str, Any]) -> str:
    measures = {"rated": ("Spearman", "spearman", "rating"), "pairs": ("accuracy", "accuracy", "pair")}
    parts = [
        f"{title} {figures[name]:.2f} on {count(figures[number], unit)}"
        if figures[number] >= MIN_HELD_OUT
        else f"{count(figures[number], unit)}: too few to judge"
        for number, (title, name, unit) in measures.items()
        if figures[number]
    ]
    return ", ".join(parts) or "nothing held out"


def load(base: Base, run: Run) -> RewardModel:
    """Load a published reward model."""
    if run.manifest.stage != "reward":
        raise UserError(f"{run.path} is a run of {run.manifest.stage}, not a reward model; name a run of `reward`")
    run.refuse_other_base(base.fingerprint)
    run.check_files()
    return RewardModel.load(base, run.path, run.manifest.method["objectives"])


# --- data ---


def prepare(recipe: Recipe, settings: Reward, base: Base, screen: Screen) -> RewardData:
    """Read, scale, split and tokenise every source; report what is dropped or truncated."""
    facts: dict[str, Any] = {}
    rated = []
    for name, table in settings.ratings.items():
        answers = token_rows.read_token_ratings(
            table, base, settings.held_out, settings.limit, settings.max_length, screen
        )
        facts[f"ratings {name}"] = answers.facts
        rated.append((answers.train, answers.held_out))
    compared = {}
    for head, preference in settings.pairs.items():
        [axis] = recipe.parts(preference)
        pairs = token_rows.read_token_pairs(axis, base, settings.held_out, settings.limit, settings.max_length, screen)
        facts[f"pairs {head}"] = pairs.facts
        compared[head] = pairs.train, pairs.held_out
    for source, counts in facts.items():
        token_rows.report_dropped(source, counts, screen)
    heads = _heads(settings, (row for train, _ in rated for row in train))
    sides = [
        [
            *(_rated(of[side], tuple(heads)) for of in rated),
            *(_compared(of[side], len(heads), list(heads).index(head)) for head, of in compared.items()),
        ]
        for side in (0, 1)
    ]
    return RewardData(heads, concat(sides[0]), concat(sides[1]), facts)


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
    """Return the mean and deviation of each head: one per rated attribute and per name under `pairs`.

    Refuse derived objectives that name no head.
    """
    ratings: dict[str, list[float]] = {}
    for row in rated:
        for name, rating in row.ratings.items():
            if not math.isnan(rating):
                ratings.setdefault(name, []).append(rating)
    heads = {}
    for name, values in ratings.items():
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        heads[name] = (mean, deviation or 1.0)
    heads |= {name: UNRATED for name in settings.pairs if name not in heads}
    for name, parts in settings.objectives.items():
        unknown = [part for part in parts if part not in heads]
        if unknown or name in heads:
            why = f"no head {unknown[0]!r}" if unknown else "a head has this name; choose another one"
            raise UserError(f"reward.objectives.{name}: {why} (heads: {', '.join(heads)})")
    return heads


# --- training ---


class RewardStepTrainer(StepTrainer[Example], Trainer):
    """transformers' Trainer with the optimizer steps of StepTrainer."""


def _trainer(
    model: PreTrainedModel, base: Base, lora: Lora, settings: dict[str, Any], steps: StepInputs[Example]
) -> RewardStepTrainer:
    policy = get_peft_model(model, lora_trainer.adapter_config(lora, base))
    policy.heads = cast(RewardLoss, steps.loss).heads  # gradient clipping and the optimizer see them
    if settings["gradient_checkpointing"]:
        policy.enable_input_require_grads()
    del settings["max_length"]  # only TRL's configurations have it; rows are truncated already
    return RewardStepTrainer(steps, model=policy, args=TrainingArguments(**settings))

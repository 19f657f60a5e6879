"""One preference adapter a direction: DPO from the start policy, on labels as they are or switched."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from lora_align import runs
from lora_align.console import Screen, library_log
from lora_align.data import pairs
from lora_align.data.rows import Pair
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.tokenise import TokenPair
from lora_align.preference import Direction
from lora_align.recipe import Recipe
from lora_align.runs import LOG, Manifest, Run
from lora_align.stages import start as start_policy
from lora_align.stages import training

FIGURES = {
    "loss": "loss",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}
ENOUGH = 20  # held-out pairs below which an accuracy says nothing
TINY = 1e-4  # ‖Δ‖/‖W‖ below which an adapter does nothing one could see


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer over rows that are token ids already, with their reference log-probabilities."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.precompute_ref_logps = True  # said to its configuration, TRL would compute and cache them its own way

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


@dataclass(frozen=True)
class Material:
    """A preference's pairs as token ids, and what a manifest says of them."""

    train: list[TokenPair]
    held_out: list[TokenPair]
    facts: dict[str, Any]

    def referenced(self, model: PreTrainedModel, batch: int, label: str, screen: Screen) -> "Material":
        """With the start policy's log-probabilities: computed once, for both directions."""
        rows = [*self.train, *self.held_out[: training.EVALUATE_AT_MOST]]
        answers = [(row.prompt, answer) for row in rows for answer in (row.chosen, row.rejected)]
        with screen.progress(label, len(answers)) as progress:
            logprobs = answer_logprobs(model, answers, batch, lambda done: progress.show(done, {}))
        known = [
            replace(row, reference=(chosen, rejected))
            for row, (chosen, rejected) in zip(rows, logprobs.view(-1, 2).tolist(), strict=True)
        ]
        return replace(self, train=known[: len(self.train)], held_out=known[len(self.train) :])


def run(
    recipe: Recipe,
    preferences: Sequence[str],
    directions: Sequence[Direction],
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
) -> list[Run]:
    """Train preferences' adapters one after the other on one loaded base, and publish each.

    Everything that can be refused is, for all of them, before the first one trains.
    """
    for preference in preferences:
        recipe.preference(preference)
        for direction in directions:
            runs.refuse_existing(_target(runs_dir, name or preference, direction), force)
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    materials = {preference: prepare(recipe, preference, base) for preference in preferences}
    published = []
    model: PreTrainedModel | None = None
    for preference, material in materials.items():
        about = Manifest(
            stage="dpo",
            base=base.identity,
            recipe=recipe.as_dict(),
            preference=preference,
            start=start_policy.identity(start),
            seeds={"init": recipe.lora.init_seed, "data": recipe.dpo.seed},
            data=material.facts,
        )
        for direction in directions:
            called = name or preference
            target, label = _target(runs_dir, called, direction), f"{called} {direction.value}"
            with runs.claim(target, screen, force=force) as staging, library_log(staging / LOG):
                model = model or start_policy.load(base, start)
                if direction is directions[0]:
                    batch = 2 * recipe.dpo.micro_batch_size
                    material = material.referenced(model, batch, f"{called} reference", screen)
                facts, model = train(model, base, recipe, material, direction, label, staging, screen)
                published.append(runs.publish(staging, target, replace(about, direction=direction.value, **facts)))
            for reason in published[-1].manifest.unconverged:
                screen.warn(f"{target}: unconverged: {reason}")
    return published


def told(run: Run) -> str:
    """A run in one line."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["pairs"]:
        return f"{run.path}  no pairs held out, nothing measured"
    margin, accuracy, pairs = held_out["margin"], held_out["accuracy"], held_out["pairs"]
    return f"{run.path}  held-out margin {margin:+.3f}, accuracy {accuracy:.2f} ({pairs} pairs)"


def _target(runs_dir: Path, name: str, direction: Direction) -> Path:
    return runs_dir / "dpo" / name / direction.value


def prepare(recipe: Recipe, preference: str, base: Base) -> Material:
    """Read, rank, split and tokenise; whatever is dropped or cut is counted."""
    axis = recipe.preference(preference)
    split = pairs.load_pairs(axis, recipe.dpo.held_out, recipe.dpo.limit)
    counts: Counter[str] = Counter()
    max_length = min(recipe.dpo.max_length, base.max_length)

    def fitting(rows: list[Pair]) -> list[TokenPair]:
        found = (tokenise.pair(row, base.chat, max_length, counts) for row in rows)
        return [row for row in found if row is not None]

    train_rows, held_out = fitting(split.train), fitting(split.held_out)
    facts = pairs.facts(axis.data, split, len(train_rows), len(held_out), counts, max_length)
    return Material(train_rows, held_out, facts)


def train(
    model: PreTrainedModel,
    base: Base,
    recipe: Recipe,
    material: Material,
    direction: Direction,
    label: str,
    folder: Path,
    screen: Screen,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Train one adapter into a folder; the manifest's fields about it, and the model as it came."""
    rows = [row.facing(direction) for row in material.train]
    with training.accepted_by_libraries():
        trainer = TokenisedDPOTrainer(
            model=model,
            args=DPOConfig(
                beta=recipe.dpo.beta,
                label_smoothing=recipe.dpo.label_smoothing,
                disable_dropout=False,  # TRL's True would silence lora.dropout; the base has none
                **training.arguments(recipe.dpo, base, folder),
            ),
            train_dataset=Dataset.from_list([_columns(row) for row in rows]),
            processing_class=base.chat.tokenizer,
            peft_config=training.fresh_adapter(recipe.lora, base),
        )
    initial = training.initialise(trainer.model, recipe.lora.init_seed)
    with training.watched(trainer, screen, label, folder, FIGURES) as watch:
        trainer.train()
    policy: PeftModel = trainer.model
    training.save_adapter(policy, folder)
    held_out = [row.facing(direction) for row in material.held_out[: training.EVALUATE_AT_MOST]]
    size, relative = training.relative_size(policy)
    metrics = {
        "steps": trainer.state.global_step,
        "first_margin": watch.history[0]["margin"],
        "norm": size,
        "relative_norm": relative,
        "held_out": held_out_margins(policy, held_out, recipe.dpo.beta, 2 * recipe.dpo.micro_batch_size),
        "tokens_per_second": watch.history[-1]["tokens_per_second"],
        "seconds": round(watch.seconds, 1),
    }
    training.draw_curve(watch.history, label, folder / "curve.png")
    facts = {"initial_adapter": initial, "metrics": metrics, "unconverged": unconverged(metrics)}
    return facts, training.unwrap(policy)


def held_out_margins(policy: PeftModel, rows: Sequence[TokenPair], beta: float, batch: int) -> dict[str, float]:
    """Mean margin β[(log π − log π_ref)(chosen) − (…)(rejected)] and how often it is positive, over unseen prompts."""
    if not rows:
        return {"pairs": 0}
    answers = [(row.prompt, answer) for row in rows for answer in (row.chosen, row.rejected)]
    policy.eval()
    trained = answer_logprobs(policy.get_base_model(), answers, batch).view(-1, 2)
    rewards = beta * (trained - torch.tensor([row.reference for row in rows]))
    margins = rewards[:, 0] - rewards[:, 1]
    wins = float((margins > 0).float().mean())
    return {"pairs": len(rows), "margin": float(margins.mean()), "accuracy": wins}


def unconverged(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Reasons to believe that a run has learned nothing."""
    found = []
    held_out = metrics["held_out"]
    if held_out["pairs"] >= ENOUGH:
        chance = 0.5 + 2 * math.sqrt(0.25 / held_out["pairs"])
        if held_out["accuracy"] < chance:
            found.append(
                f"held-out accuracy {held_out['accuracy']:.2f} on {held_out['pairs']} pairs is near chance; "
                "train longer, or at a higher learning_rate, or look at the data"
            )
    if metrics["relative_norm"] < TINY:
        found.append(f"the adapter is tiny: ‖Δ‖/‖W‖ = {metrics['relative_norm']:.1e}; raise learning_rate or epochs")
    return tuple(found)


def _columns(row: TokenPair) -> dict[str, Any]:
    chosen, rejected = row.reference
    return {
        "prompt_ids": row.prompt,
        "chosen_ids": row.chosen,
        "rejected_ids": row.rejected,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }

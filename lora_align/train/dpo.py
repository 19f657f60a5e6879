"""One preference adapter a direction: DPO from the start policy, on labels as they are or switched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from lora_align import runs
from lora_align.console import Screen, count, library_log
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.model import base as bases
from lora_align.model.base import Base, base_model_of
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Reader, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.tokenise import TokenPair
from lora_align.policy import start as start_policy
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.runs import LOG, Manifest, Run
from lora_align.train import checkpoints, lora_trainer
from lora_align.train import token_rows as materials
from lora_align.train.checkpoints import Unfinished
from lora_align.train.reference_cache import ReferenceCache
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import Part, StepTrainer
from lora_align.train.token_rows import TokenRows

TINY = 1e-4  # ‖Δ‖/‖W‖ below which an adapter does nothing one could see
HUGE = 0.5  # ‖Δ‖/‖W‖ above which little of the base is left
WORSE = -1.0  # mean margin below which a loss is about twice that of no training at all
BELOW, FAR_BELOW = -1.0, -5.0  # mean margins in nats, not scaled by β: clearly below 0, and diverged
LAST = 10  # steps whose mean margin says where a run ended


class SteppingDPOTrainer(StepTrainer[TokenPair], DPOTrainer):
    """TRL's trainer, with steps made here."""


@dataclass(frozen=True)
class DpoLoss:
    """−log σ(margin) over pairs: the margin is β[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)].

    `smoothing` is the chance that a label is the wrong way round.
    """

    reader: Reader
    chat: ChatFormat
    beta: float
    smoothing: float = 0.0

    def length(self, row: TokenPair) -> int:
        """Of both answers, the prompt they may share included."""
        return self.reader.length(row.shared())

    def weights(self, rows: Sequence[TokenPair]) -> list[float]:
        """Every pair counts alike."""
        return [float(len(rows))]

    def part(self, rows: Sequence[TokenPair], weights: Sequence[float]) -> Part:
        """Some pairs of a step."""
        sums, _ = self.reader.sums([row.shared() for row in rows])
        reference = torch.tensor([row.reference for row in rows], device=sums.device)
        rewards = self.beta * (sums.view(-1, 2) - reference)  # [b, 2]
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.smoothing) * logsigmoid(margins) - self.smoothing * logsigmoid(-margins)
        found = torch.stack([margins, (margins > 0).float(), *rewards.T]).detach().sum(1).unbind()
        names = ("margin", "accuracy", "chosen_reward", "rejected_reward")
        count = float(len(rows))
        return Part(losses.sum() / weights[0], {name: (total, count) for name, total in zip(names, found, strict=True)})

    def quoted(self, row: TokenPair) -> str:
        """How its answer to prefer begins."""
        return self.chat.opening(row.chosen)


def train_dpo(
    recipe: Recipe,
    preferences: Sequence[str],
    directions: Sequence[Direction],
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
    resume: bool = False,
) -> list[Run]:
    """Train preferences' adapters one after the other on one loaded base, and publish each.

    Everything that can be refused is, for all of them, before the first one trains.
    """
    recipe.check_trains("dpo")
    lora_trainer.check_trackers(recipe.dpo)
    for preference in preferences:
        recipe.preference(preference)
        for direction in directions:
            target = _target(runs_dir, name or preference, direction)
            runs.refuse_busy(target)
            if not (resume and runs.is_run(target)):
                runs.refuse_existing(target, force, "--resume keeps it and goes on with what is missing")
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    prepared = {preference: prepare(recipe, preference, base, screen) for preference in preferences}
    references = ReferenceCache.of(base, start_policy.identity(start))
    room = MemoryBudget(recipe.dpo.tokens_per_batch, lora_trainer.TOO_LONG)
    begun: dict[Path, Unfinished] = {}
    for preference in preferences:
        for direction in directions:
            target = _target(runs_dir, name or preference, direction)
            data = prepared[preference].facts["fingerprint"]
            who = checkpoints.run_identity("dpo", recipe, base, start_policy.identity(start), data)
            begun[target] = Unfinished.of(
                target, {**who, "direction": direction.value}, resume=resume, force=force, screen=screen
            )
    published = []
    model: PreTrainedModel | None = None
    for preference, material in prepared.items():
        about = Manifest(
            stage="dpo",
            base=base.identity,
            recipe=recipe.as_dict(),
            preference=preference,
            start=start_policy.identity(start),
            seeds={"init": recipe.lora.init_seed, "data": recipe.dpo.seed},
            data=material.facts,
        )
        ready: TokenRows[TokenPair] | None = None
        for direction in directions:
            called = name or preference
            target, label = _target(runs_dir, called, direction), f"{called} {direction.value}"
            if resume and (made := begun[target].published(target, screen)):
                published.append(made)
                continue
            with runs.staging_folder(target, screen, force=force) as staging, library_log(staging / LOG):
                model = model or start_policy.load(base, start)
                if ready is None:
                    tokens = 2 * recipe.dpo.tokens_per_batch  # nothing is kept for a gradient
                    ready = referenced(material, references, model, tokens, f"{called} reference", screen)
                facts, model = train_adapter(
                    model, base, recipe, ready, direction, label, staging, begun[target], screen, room
                )
                published.append(runs.publish(staging, target, replace(about, direction=direction.value, **facts)))
                begun[target].clear()
            lora_trainer.warn_unconverged(published[-1], screen)
            if not published[-1].manifest.metrics["held_out"]["pairs"]:
                screen.warn(
                    f"{target}: no pair was held out, so nothing is measured; a larger dpo.limit or dpo.held_out"
                )
            if "note" in (held_out := published[-1].manifest.metrics["held_out"]):
                screen.warn(f"{target}: {held_out['note']}")
    return published


def summary(run: Run) -> str:
    """A run in one line."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["pairs"]:
        return f"{run.path}  no pairs held out, nothing measured"
    margin, pairs = held_out["margin"], count(held_out["pairs"], "pair")
    if held_out["pairs"] < MIN_HELD_OUT:
        return f"{run.path}  held-out margin {margin:+.3f} ({pairs}: too few to judge)"
    return f"{run.path}  held-out margin {margin:+.3f}, accuracy {held_out['accuracy']:.2f} ({pairs})"


def _target(runs_dir: Path, name: str, direction: Direction) -> Path:
    return runs_dir / "dpo" / name / direction.value


def prepare(recipe: Recipe, preference: str, base: Base, screen: Screen) -> TokenRows[TokenPair]:
    """Read, rank, split and tokenise; whatever is dropped or cut is counted."""
    settings = recipe.dpo
    found = [
        materials.read_token_pairs(axis, base, settings.held_out, settings.limit, settings.max_length, screen)
        for axis in recipe.parts(preference)
    ]
    material = materials.interleave(found)
    materials.report_dropped(preference, material.facts, screen)
    return material


def referenced(
    material: TokenRows[TokenPair],
    references: ReferenceCache,
    model: PreTrainedModel,
    tokens: int,
    label: str,
    screen: Screen,
) -> TokenRows[TokenPair]:
    """With the start policy's log-probabilities: computed once, for both directions and for later runs."""
    rows = concat([material.train, material.held_out[: lora_trainer.EVALUATE_AT_MOST]])
    shared = LazyRows(len(rows), lambda i: rows[i].shared())
    found = references.logprobs(model, shared, tokens, label, screen)

    def with_reference(i: int) -> TokenPair:
        chosen, rejected = found[i]
        return replace(rows[i], reference=(chosen, rejected))

    known = LazyRows(len(rows), with_reference)
    return replace(material, train=known[: len(material.train)], held_out=known[len(material.train) :])


def train_adapter(
    model: PreTrainedModel,
    base: Base,
    recipe: Recipe,
    material: TokenRows[TokenPair],
    direction: Direction,
    label: str,
    folder: Path,
    unfinished: Unfinished,
    screen: Screen,
    room: MemoryBudget | None = None,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Train one adapter into a folder, in as much room as one before it found; the manifest's fields about it, and the
    model as it came."""
    with lora_trainer.accepted_by_libraries():
        trainer = SteppingDPOTrainer(
            objective=DpoLoss(Reader.of(model), base.chat, recipe.dpo.beta, recipe.dpo.label_smoothing),
            rows=LazyRows(len(material.train), lambda i: material.train[i].facing(direction)),
            room=room or MemoryBudget(recipe.dpo.tokens_per_batch, lora_trainer.TOO_LONG),
            unfinished=unfinished,
            tell=lambda text: screen.note(f"{label}: {text}"),
            model=model,
            args=DPOConfig(
                disable_dropout=False,  # TRL's True would silence lora.dropout; the base has none
                **lora_trainer.arguments(recipe.dpo, base, folder, label),
            ),
            processing_class=base.chat.tokenizer,
            peft_config=lora_trainer.fresh_adapter(recipe.lora, base),
        )
    initial = lora_trainer.initialise(trainer.model, recipe.lora.init_seed)
    watch = lora_trainer.fit(trainer, recipe.dpo, screen, label)
    policy = trainer.model
    lora_trainer.save_adapter(policy, folder)
    held_out = [row.facing(direction) for row in material.held_out[: lora_trainer.EVALUATE_AT_MOST]]
    size, relative = lora_trainer.relative_size(policy)
    metrics = {
        "steps": trainer.state.global_step,
        "first_margin": watch.history[0]["margin"],
        "last_margin": fmean(step["margin"] for step in watch.history[-LAST:]),
        "norm": size,
        "relative_norm": relative,
        "held_out": held_out_margins(policy, held_out, recipe.dpo.beta, 2 * trainer.room.size),
        "tokens_per_second": watch.history[-1]["tokens_per_second"],
        "seconds": round(watch.seconds, 1),
    }
    lora_trainer.draw_curve(watch.history, label, folder / "curve.png")
    facts = {"initial_adapter": initial, "metrics": metrics, "unconverged": unconverged(metrics, recipe.dpo.beta)}
    return facts, lora_trainer.unwrap(policy)


def held_out_margins(policy: PeftModel, rows: Sequence[TokenPair], beta: float, tokens: int) -> dict[str, Any]:
    """Mean margin β[(log π − log π_ref)(chosen) − (…)(rejected)] and how often it is positive, over unseen prompts.

    Of less than ENOUGH pairs there is no accuracy, but a note: 1 of 1 would look like something that was learned.
    """
    if not rows:
        return {"pairs": 0}
    policy.eval()
    trained = answer_logprobs(base_model_of(policy), [row.shared() for row in rows], MemoryBudget(tokens)).view(-1, 2)
    rewards = beta * (trained - torch.tensor([row.reference for row in rows]))
    margins = rewards[:, 0] - rewards[:, 1]
    found = {"pairs": len(rows), "margin": float(margins.mean())}
    if len(rows) < MIN_HELD_OUT:
        return {**found, "accuracy": None, "note": lora_trainer.too_few_pairs(len(rows))}
    return {**found, "accuracy": float((margins > 0).float().mean())}


def unconverged(metrics: Mapping[str, Any], beta: float) -> tuple[str, ...]:
    """Return why a run seems to have learned nothing, or to have diverged."""
    held_out, size = metrics["held_out"], metrics["relative_norm"]
    margins = {"held-out": held_out.get("margin", 0.0), "last training": metrics.get("last_margin", 0.0)}
    worse = [
        f"the {which} margin is {margin:.2f}"
        for which, margin in margins.items()
        if margin < WORSE or margin / beta < FAR_BELOW
    ]
    worse += [f"the adapter is huge, ‖Δ‖/‖W‖ = {size:.2f}"] if size > HUGE else []
    if worse:
        return (f"{lora_trainer.DIVERGED}{' and '.join(worse)}; lower learning_rate",)
    found = []
    accuracy = held_out.get("accuracy")
    if accuracy is not None:
        reach = 2 * math.sqrt(0.25 / held_out["pairs"])
        said = f"held-out accuracy {accuracy:.2f} on {count(held_out['pairs'], 'pair')} is "
        if accuracy < 0.5 - reach:
            found.append(f"{said}worse than chance; lower learning_rate, or look at the labels")
        elif accuracy < 0.5 + reach and margins["held-out"] / beta < BELOW:
            found.append(f"{said}near chance, with a margin below 0; lower learning_rate, or look at the data")
        elif accuracy < 0.5 + reach:
            found.append(f"{said}near chance; train longer, or at a higher learning_rate, or look at the data")
    if size < TINY:
        found.append(f"the adapter is tiny: ‖Δ‖/‖W‖ = {size:.1e}; raise learning_rate or epochs")
    return tuple(found)

"""The command `dpo`: the DPO loss, and an adapter for each preference and direction."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from lora_align import runs
from lora_align.console import Screen, count
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.model import base as bases
from lora_align.model.base import Base, base_model_of
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Reader, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.tokenise import TokenPair
from lora_align.policy import start_policy
from lora_align.rankers import Direction
from lora_align.recipe import Dpo, Lora, Recipe
from lora_align.runs import DIVERGED, Manifest, Run
from lora_align.train import checkpoints, lora_trainer, token_rows
from lora_align.train.job import Job, Target
from lora_align.train.lora_trainer import Trained
from lora_align.train.reference_cache import ReferenceCache
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import PartLoss, StepInputs, StepTrainer
from lora_align.train.token_rows import TokenRows

TINY_UPDATE = 1e-4  # ‖Δ‖/‖W‖ below which an adapter has no visible effect
DIVERGED_MARGIN = -1.0  # mean margin at which the loss is about twice that of an untrained adapter
LOW_NATS, DIVERGED_NATS = -1.0, -5.0  # mean margin / β, in nats, of an unconverged and of a diverged run
LAST_STEPS = 10  # steps at the end whose mean margin is reported as `last_margin`


class DpoStepTrainer(StepTrainer[TokenPair], DPOTrainer):
    """TRL's DPOTrainer with the optimizer steps of StepTrainer."""


def _trainer(
    model: PreTrainedModel, base: Base, lora: Lora, settings: dict[str, Any], steps: StepInputs[TokenPair]
) -> DpoStepTrainer:
    return DpoStepTrainer(
        steps,
        model=model,
        args=DPOConfig(disable_dropout=False, **settings),  # True would turn off lora.dropout; the base has none
        processing_class=base.chat.tokenizer,
        peft_config=lora_trainer.adapter_config(lora, base),
    )


@dataclass(frozen=True)
class DpoLoss:
    """The mean of −log σ(margin) over pairs (arXiv 2305.18290, equation 7).

    margin = β[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]. `smoothing` is the assumed probability that
    a label is wrong (conservative DPO).
    """

    reader: Reader
    chat: ChatFormat
    beta: float
    smoothing: float = 0.0

    def length(self, row: TokenPair) -> int:
        """Return the number of tokens that a pass over the prompt and both answers takes."""
        return self.reader.length(row.shared())

    def weights(self, rows: Sequence[TokenPair]) -> list[float]:
        """Return the number of pairs."""
        return [float(len(rows))]

    def part(self, rows: Sequence[TokenPair], weights: Sequence[float]) -> PartLoss:
        """Return the summed loss of some pairs, divided by the number of pairs in the whole step."""
        sums, _ = self.reader.sums([row.shared() for row in rows])
        reference = torch.tensor([row.reference for row in rows], device=sums.device)
        losses, rewards = dpo_loss(sums.view(-1, 2), reference, self.beta, self.smoothing)
        margins = rewards[:, 0] - rewards[:, 1]
        figures = torch.stack([margins, (margins > 0).float(), *rewards.T]).detach().sum(1).unbind()
        names = ("margin", "accuracy", "chosen_reward", "rejected_reward")
        count = float(len(rows))
        return PartLoss(
            losses.sum() / weights[0], {name: (total, count) for name, total in zip(names, figures, strict=True)}
        )

    def excerpt(self, row: TokenPair) -> str:
        """Return the first words of the chosen answer."""
        return self.chat.excerpt(row.chosen)


def dpo_loss(logprobs: Tensor, reference: Tensor, beta: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the losses [n] and rewards β(log π − log π_ref) [n, 2] of pairs, from log-probabilities [n, 2].

    Column 0 is the chosen answer, column 1 the rejected one.
    """
    rewards = beta * (logprobs - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins), rewards


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
    """Train and publish an adapter for each preference and direction, one after the other on one loaded base.

    Everything that can be refused is refused before the first adapter is trained.
    """
    recipe.check_trains("dpo")
    lora_trainer.check_trackers(recipe.dpo)
    targets: dict[tuple[str, Direction], Target] = {}
    for preference, direction in itertools.product(preferences, directions):
        recipe.preference(preference)
        folder, label = name or preference, f"{name or preference} {direction.value}"
        target = Target(runs_dir / "dpo" / folder / direction.value, label, screen, force, resume)
        target.refuse_existing("--resume keeps it and trains what is missing")
        targets[preference, direction] = target
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    datasets = {preference: prepare(recipe, preference, base, screen) for preference in preferences}
    saved = {}
    for (preference, direction), target in targets.items():
        fingerprint = datasets[preference].facts["fingerprint"]
        identity = checkpoints.run_identity("dpo", recipe, base, start_policy.identity(start), fingerprint)
        saved[target] = target.checkpoints({**identity, "direction": direction.value})
    references = ReferenceCache.of(base, start_policy.identity(start))
    budget = MemoryBudget(recipe.dpo.tokens_per_batch, lora_trainer.OUT_OF_MEMORY_ADVICE)  # one for all adapters
    with_logprobs: dict[str, TokenRows[TokenPair]] = {}
    model: PreTrainedModel | None = None
    published = []
    for (preference, direction), target in targets.items():
        if run := target.find_published(saved[target]):
            published.append(run)
            continue
        with target.staging_folder() as staging:
            model = model or start_policy.load(base, start)
            if preference not in with_logprobs:
                tokens, label = 2 * recipe.dpo.tokens_per_batch, f"{name or preference} reference"
                with_logprobs[preference] = with_references(
                    datasets[preference], references, model, tokens, label, screen
                )
            rows = for_direction(with_logprobs[preference], direction)
            job = dpo_job(recipe.dpo, recipe.lora, rows.train, base)
            trained = lora_trainer.train(job, model, target, saved[target], staging, budget)
            facts = datasets[preference].facts
            manifest = _manifest(recipe, base, preference, direction, start_policy.identity(start), facts)
            run = target.publish(staging, measure(trained, manifest, rows.held_out))
        model = lora_trainer.unwrap(trained.policy)
        published.append(run)
        _warn_if_unmeasured(run, screen)
    return published


def _manifest(
    recipe: Recipe, base: Base, preference: str, direction: Direction, start: str, facts: dict[str, Any]
) -> Manifest:
    """Return a run's manifest before training."""
    return Manifest(
        stage="dpo",
        base=base.identity,
        recipe=recipe.as_dict(),
        preference=preference,
        direction=direction.value,
        start=start,
        seeds={"init": recipe.lora.init_seed, "data": recipe.dpo.seed},
        data=facts,
    )


def _warn_if_unmeasured(run: Run, screen: Screen) -> None:
    """Warn if too few pairs were held out to judge a run."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["pairs"]:
        screen.warn(f"{run.path}: no pair was held out, so nothing was measured; raise dpo.limit or dpo.held_out")
    elif "note" in held_out:
        screen.warn(f"{run.path}: {held_out['note']}")


def dpo_job(settings: Dpo, lora: Lora, pairs: Sequence[TokenPair], base: Base) -> Job[TokenPair]:
    """Return a job that trains on pairs with reference log-probabilities."""

    def loss(_: PreTrainedModel, reader: Reader) -> DpoLoss:
        return DpoLoss(reader, base.chat, settings.beta, settings.label_smoothing)

    return Job(base, settings, lora, pairs, loss, _trainer)


def measure(trained: Trained[TokenPair], manifest: Manifest, held_out: Sequence[TokenPair]) -> Manifest:
    """Measure the held-out margin and the adapter's size, and return the manifest with all facts about the training."""
    loss, history = cast(DpoLoss, trained.loss), trained.history
    pairs = held_out[: lora_trainer.MEASURE_AT_MOST]
    norm, relative_norm = lora_trainer.relative_size(trained.policy)
    metrics: dict[str, Any] = {
        "first_margin": history[0]["margin"],
        "last_margin": fmean(step["margin"] for step in history[-LAST_STEPS:]),
        "norm": norm,
        "relative_norm": relative_norm,
        "held_out": held_out_margins(trained.policy, pairs, loss.beta, 2 * trained.tokens_at_once),
        "tokens_per_second": history[-1]["tokens_per_second"],
    }
    enough = metrics["held_out"].get("accuracy") is not None
    return trained.describe(manifest, metrics, unconverged(metrics, loss.beta), enough_held_out=enough)


def summary(run: Run) -> str:
    """Return one line of text about a run."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["pairs"]:
        return f"{run.path}  no pairs held out, nothing measured"
    margin, pairs = held_out["margin"], count(held_out["pairs"], "pair")
    if held_out["pairs"] < MIN_HELD_OUT:
        return f"{run.path}  held-out margin {margin:+.3f} ({pairs}: too few to judge)"
    return f"{run.path}  held-out margin {margin:+.3f}, accuracy {held_out['accuracy']:.2f} ({pairs})"


def prepare(recipe: Recipe, preference: str, base: Base, screen: Screen) -> TokenRows[TokenPair]:
    """Read, rank, split and tokenise a preference's pairs; report what is dropped or truncated."""
    settings = recipe.dpo
    parts = [
        token_rows.read_token_pairs(axis, base, settings.held_out, settings.limit, settings.max_length, screen)
        for axis in recipe.parts(preference)
    ]
    rows = token_rows.interleave(parts)
    token_rows.report_dropped(preference, rows.facts, screen)
    return rows


def with_references(
    dataset: TokenRows[TokenPair],
    references: ReferenceCache,
    model: PreTrainedModel,
    tokens: int,
    label: str,
    screen: Screen,
) -> TokenRows[TokenPair]:
    """Add the start policy's log-probabilities to the pairs that are trained on or measured."""
    rows = concat([dataset.train, dataset.held_out[: lora_trainer.MEASURE_AT_MOST]])
    shared = LazyRows(len(rows), lambda i: rows[i].shared())
    logprobs = references.logprobs(model, shared, tokens, label, screen)

    def with_reference(i: int) -> TokenPair:
        chosen, rejected = logprobs[i]
        return replace(rows[i], reference=(chosen, rejected))

    pairs = LazyRows(len(rows), with_reference)
    return replace(dataset, train=pairs[: len(dataset.train)], held_out=pairs[len(dataset.train) :])


def for_direction(dataset: TokenRows[TokenPair], direction: Direction) -> TokenRows[TokenPair]:
    """Return the pairs that a direction trains on: swapped for `neg`."""
    train, held_out = dataset.train, dataset.held_out
    return replace(
        dataset,
        train=LazyRows(len(train), lambda i: train[i].for_direction(direction)),
        held_out=LazyRows(len(held_out), lambda i: held_out[i].for_direction(direction)),
    )


def held_out_margins(policy: PeftModel, rows: Sequence[TokenPair], beta: float, tokens: int) -> dict[str, Any]:
    """Return the mean margin of held-out pairs and the share of positive margins (accuracy).

    Fewer than MIN_HELD_OUT pairs get a note instead of an accuracy, because 1 of 1 would look like success.
    """
    if not rows:
        return {"pairs": 0}
    policy.eval()
    logprobs = answer_logprobs(base_model_of(policy), [row.shared() for row in rows], MemoryBudget(tokens)).view(-1, 2)
    _, rewards = dpo_loss(logprobs, torch.tensor([row.reference for row in rows]), beta)
    margins = rewards[:, 0] - rewards[:, 1]
    figures = {"pairs": len(rows), "margin": float(margins.mean())}
    if len(rows) < MIN_HELD_OUT:
        return {**figures, "accuracy": None, "note": lora_trainer.too_few_pairs(len(rows))}
    return {**figures, "accuracy": float((margins > 0).float().mean())}


def unconverged(metrics: Mapping[str, Any], beta: float) -> tuple[str, ...]:
    """Return the reasons to doubt a run: it diverged or learned nothing. Return () if there are none."""
    held_out, size = metrics["held_out"], metrics["relative_norm"]
    margins = {"held-out": held_out.get("margin", 0.0), "last training": metrics.get("last_margin", 0.0)}
    worse = [
        f"the {which} margin is {margin:.2f}"
        for which, margin in margins.items()
        if margin < DIVERGED_MARGIN or margin / beta < DIVERGED_NATS
    ]
    worse += lora_trainer.too_large(size)
    if worse:
        return (f"{DIVERGED}{' and '.join(worse)}; lower learning_rate",)
    reasons = []
    accuracy, number = held_out.get("accuracy"), count(held_out["pairs"], "pair")
    low = margins["held-out"] / beta < LOW_NATS
    if accuracy is not None:
        noise = 2 * math.sqrt(0.25 / held_out["pairs"])
        measured = f"held-out accuracy {accuracy:.2f} on {number} is "
        if accuracy < 0.5 - noise:
            reasons.append(f"{measured}worse than chance; lower learning_rate, or check the labels")
        elif accuracy < 0.5 + noise and not low:
            reasons.append(f"{measured}near chance; train longer, raise learning_rate, or check the data")
    if low and not reasons:
        reasons.append(f"the held-out margin is {margins['held-out']:.2f} on {number}; lower learning_rate")
    if size < TINY_UPDATE:
        reasons.append(f"the adapter is tiny: ‖Δ‖/‖W‖ = {size:.1e}; raise learning_rate or epochs")
    return tuple(reasons)

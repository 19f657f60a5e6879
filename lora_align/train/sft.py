"""The command `sft`: the start policy's adapter, trained on conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from lora_align import runs
from lora_align.console import Screen, count
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base, base_model_of
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Reader, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.tokenise import IGNORED, TokenText
from lora_align.policy import start_policy
from lora_align.recipe import Lora, Recipe, Rsf, Sft
from lora_align.runs import DIVERGED, Manifest, Run
from lora_align.train import checkpoints, lora_trainer, token_rows
from lora_align.train.job import Job, Target
from lora_align.train.lora_trainer import Trained
from lora_align.train.row_files import LazyRows
from lora_align.train.stepper import PartLoss, StepInputs, StepTrainer

UNCHANGED = 0.01  # nats per token; a smaller rise of the held-out loss means that the run learned nothing
DIVERGED_RISE = 1.0  # nats per token; a run whose held-out loss rises by more has diverged
Pack = Sequence[TokenText]


def train_sft(recipe: Recipe, runs_dir: Path, screen: Screen, *, force: bool = False, resume: bool = False) -> Run:
    """Train and publish the start policy's adapter."""
    recipe.check_trains("sft")
    settings = recipe.sft
    assert settings is not None
    lora_trainer.check_trackers(settings)
    target = Target(start_policy.folder(runs_dir), "sft", screen, force, resume)
    target.refuse_existing("--runs DIR keeps both")
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    rows = token_rows.read_token_texts(settings, base, screen)
    token_rows.report_dropped("sft", rows.facts, screen)
    job = sft_job(settings, settings.lora or recipe.lora, rows.train, base)
    saved = target.checkpoints(checkpoints.run_identity("sft", recipe, base, "", rows.facts["fingerprint"]))
    if run := target.find_published(saved):
        return run
    manifest = Manifest(
        stage="sft",
        base=base.identity,
        recipe=recipe.as_dict(),
        contains_start=True,
        seeds={"init": job.lora.init_seed, "data": settings.seed},
        data=rows.facts,
    )
    with target.staging_folder() as staging:
        trained = lora_trainer.train(job, base.load(), target, saved, staging)
        return target.publish(staging, measure(trained, manifest, rows.held_out))


def sft_job(settings: Sft | Rsf, lora: Lora, texts: Sequence[TokenText], base: Base) -> Job[Pack]:
    """Return a job that trains on texts. With `packing`, a row holds several texts."""
    packs = [[i] for i in range(len(texts))]
    if settings.packing:
        packs = tokenise.pack([len(text.ids) for text in texts], min(settings.max_length, base.max_length))
    rows = LazyRows(len(packs), lambda pack: [texts[i] for i in packs[pack]])
    return Job(base, settings, lora, rows, lambda _, reader: SftLoss(reader, base.chat), _trainer)


def measure(trained: Trained[Pack], manifest: Manifest, held_out: Sequence[TokenText]) -> Manifest:
    """Measure the held-out loss before and after, and return the manifest with all facts about the training."""
    loss = held_out_loss(trained.policy, held_out[: lora_trainer.MEASURE_AT_MOST], 2 * trained.tokens_at_once)
    norm, relative_norm = lora_trainer.relative_size(trained.policy)
    metrics = {"norm": norm, "relative_norm": relative_norm, "held_out": loss}
    reasons = lora_trainer.diverged_by_size(relative_norm) or unconverged(loss)
    return trained.describe(manifest, metrics, reasons, enough_held_out=loss["rows"] >= MIN_HELD_OUT)


def summary(run: Run) -> str:
    """Return one line of text about a run."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["rows"]:
        return f"{run.path}  no rows held out, nothing measured"
    rows = count(held_out["rows"], "row")
    return f"{run.path}  held-out loss {held_out['loss_before']:.3f} → {held_out['loss']:.3f} ({rows})"


class SftStepTrainer(StepTrainer[Pack], SFTTrainer):
    """TRL's SFTTrainer with the optimizer steps of StepTrainer."""


def _trainer(
    model: PreTrainedModel, base: Base, lora: Lora, settings: dict[str, Any], steps: StepInputs[Pack]
) -> SftStepTrainer:
    return SftStepTrainer(
        steps,
        model=model,
        args=SFTConfig(**settings),
        processing_class=base.chat.tokenizer,
        peft_config=lora_trainer.adapter_config(lora, base),
    )


@dataclass(frozen=True)
class SftLoss:
    """Cross-entropy: the mean of −log π(token) over all labelled tokens of a step. A row is a pack of texts."""

    reader: Reader
    chat: ChatFormat

    def length(self, row: Pack) -> int:
        """Return the tokens of a pack."""
        return sum(len(text.ids) for text in row)

    def weights(self, rows: Sequence[Pack]) -> list[float]:
        """Return the number of labelled tokens. A text does not predict the first token of the next text."""
        labelled = (label != IGNORED for row in rows for text in row for label in text.labels[1:])
        return [float(max(sum(labelled), 1))]

    def part(self, rows: Sequence[Pack], weights: Sequence[float]) -> PartLoss:
        """Return the loss of some packs, divided by the number of labelled tokens in the whole step."""
        texts = [text for pack in rows for text in pack]
        labels = [label for text in texts for label in (*text.labels[1:], IGNORED)]
        at = [i for i, label in enumerate(labels) if label != IGNORED]
        states = self.reader.backbone.states([[text.ids] for text in texts])
        logprobs, hits = self.reader.predicted(states, at, [labels[i] for i in at])
        return PartLoss(sft_loss(logprobs, weights[0]), {"accuracy": (hits.sum(), float(len(at)))})

    def excerpt(self, row: Pack) -> str:
        """Return the first words of the first text."""
        return self.chat.excerpt(row[0].ids)


def sft_loss(logprobs: Tensor, count: float) -> Tensor:
    """Return −Σ log π(token) / count over labelled tokens [n]; `count` is their number in the whole step."""
    return -logprobs.sum() / count


def held_out_loss(policy: PeftModel, rows: Sequence[TokenText], tokens: int) -> dict[str, float]:
    """Return the mean loss per token, in nats, of held-out answers, without and with the adapter.

    If all tokens of a text are labelled, the whole text is its answer.
    """
    answered = [_split_answer(row) for row in rows]
    tokens_in_all = sum(len(answer) for _, (answer,) in answered)
    if not tokens_in_all:
        return {"rows": 0}
    policy.eval()
    after = -float(answer_logprobs(base_model_of(policy), answered, MemoryBudget(tokens)).sum()) / tokens_in_all
    with policy.disable_adapter():
        before = -float(answer_logprobs(base_model_of(policy), answered, MemoryBudget(tokens)).sum()) / tokens_in_all
    return {"rows": len(rows), "loss_before": before, "loss": after}


def unconverged(held_out: Mapping[str, float]) -> tuple[str, ...]:
    """Return the reasons to doubt a run: the held-out loss rose or did not fall. Return () if there are none."""
    if not held_out["rows"] or held_out["loss"] < held_out["loss_before"]:
        return ()
    figures = f"from {held_out['loss_before']:.3f} to {held_out['loss']:.3f}"
    if held_out["loss"] > held_out["loss_before"] + DIVERGED_RISE:
        return (f"{DIVERGED}held-out loss rose {figures}; lower learning_rate or epochs",)
    if held_out["loss"] > held_out["loss_before"] + UNCHANGED:
        return (f"held-out loss rose {figures}; lower learning_rate or epochs",)
    return (f"held-out loss did not fall: {figures}; train longer, or raise learning_rate",)


def _split_answer(row: TokenText) -> tuple[list[int], list[list[int]]]:
    """Split a text after its last unlabelled token, or after its first token. Return the prompt and the answer."""
    unlearned = [i for i, label in enumerate(row.labels) if label == IGNORED]
    start = unlearned[-1] + 1 if unlearned else 1
    return row.ids[:start], [row.ids[start:]]

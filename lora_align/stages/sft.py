"""The start policy's adapter: TRL's SFT over conversations, on the 4-bit base."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from lora_align import runs
from lora_align.console import Screen, library_log
from lora_align.data import pairs
from lora_align.data.rows import Conversation
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.tokenise import IGNORED, TokenText
from lora_align.recipe import Recipe
from lora_align.runs import LOG, Manifest, Run
from lora_align.stages import start as start_policy
from lora_align.stages import training

FIGURES = {"loss": "loss", "accuracy": "mean_token_accuracy"}


def run(recipe: Recipe, runs_dir: Path, screen: Screen, *, force: bool = False) -> Run:
    """Train and publish the adapter every preference then starts from."""
    settings = recipe.sft
    if settings is None:
        raise UserError(
            "the recipe has no [sft] table: its start policy is the base itself, and `dpo` needs nothing more"
        )
    target = start_policy.folder(runs_dir)
    runs.refuse_existing(target, force)
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    split = pairs.load_conversations(settings)
    counts: Counter[str] = Counter()
    max_length = min(settings.max_length, base.max_length)

    def fitting(rows: list[Conversation]) -> list[TokenText]:
        found = (tokenise.text(row, base.chat, max_length, settings.answers_only, counts) for row in rows)
        return [row for row in found if row is not None]

    train, held_out = fitting(split.train), fitting(split.held_out)[: training.EVALUATE_AT_MOST]
    cut = counts.pop("answers cut", 0)
    dropped = split.dropped + counts
    if not train:
        raise UserError(f"{settings.data}: no rows left ({pairs.reasons(dropped)}); max_length is {max_length}")
    with runs.claim(target, screen, force=force) as staging, library_log(staging / LOG):
        model = base.load()
        with training.accepted_by_libraries():
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **training.arguments(settings, base, staging),
                ),
                train_dataset=Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in train]),
                processing_class=base.chat.tokenizer,
                peft_config=training.fresh_adapter(recipe.lora, base),
            )
        initial = training.initialise(trainer.model, recipe.lora.init_seed)
        with training.watched(trainer, screen, "sft", staging, FIGURES) as watch:
            trainer.train()
        metrics = {
            "steps": trainer.state.global_step,
            "held_out": held_out_loss(trainer.model, held_out, 2 * settings.micro_batch_size),
            "seconds": round(watch.seconds, 1),
        }
        training.save_adapter(trainer.model, staging)
        training.draw_curve(watch.history, FIGURES, "sft", staging / "curve.png")
        manifest = Manifest(
            stage="sft",
            base=base.identity,
            recipe=recipe.as_dict(),
            contains_start=True,
            initial_adapter=initial,
            seeds={"init": recipe.lora.init_seed, "data": settings.seed},
            data={
                "source": asdict(settings)["data"],
                "fingerprint": split.fingerprint(),
                "rows": len(train),
                "held_out": len(held_out),
                "dropped": dict(dropped),
                "answers_cut": cut,
                "max_length": max_length,
            },
            metrics=metrics,
            unconverged=unconverged(metrics["held_out"]),
        )
        return runs.publish(staging, target, manifest)


def held_out_loss(policy: PeftModel, rows: list[TokenText], batch: int) -> dict[str, float]:
    """Nats a token on unseen prompts, before and after."""
    learned = [_answer_apart(row) for row in rows]
    tokens = sum(len(answer) for _, answer in learned)
    if not tokens:
        return {"rows": 0}
    policy.eval()
    after = -float(answer_logprobs(policy.get_base_model(), learned, batch).sum()) / tokens
    with policy.disable_adapter():
        before = -float(answer_logprobs(policy.get_base_model(), learned, batch).sum()) / tokens
    return {"rows": len(rows), "loss_before": before, "loss": after}


def unconverged(held_out: dict[str, float]) -> tuple[str, ...]:
    """A start policy that finds unseen answers no likelier than the base did has learned nothing."""
    if held_out["rows"] and held_out["loss"] >= held_out["loss_before"]:
        return (f"held-out loss rose from {held_out['loss_before']:.3f} to {held_out['loss']:.3f}",)
    return ()


def _answer_apart(row: TokenText) -> tuple[list[int], list[int]]:
    """Everything up to the last unlearned token, and the answer behind it."""
    unlearned = [i for i, label in enumerate(row.labels) if label == IGNORED]
    start = unlearned[-1] + 1 if unlearned else 1
    return row.ids[:start], row.ids[start:]

"""The start policy's adapter: TRL's SFT over conversations, on the 4-bit base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from lora_align import runs
from lora_align.console import Screen, count, library_log
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base, base_model_of
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Reader, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.tokenise import IGNORED, TokenText
from lora_align.policy import start as start_policy
from lora_align.recipe import Lora, Recipe, Rsf, Sft
from lora_align.runs import LOG, Manifest, Run
from lora_align.train import checkpoints, lora_trainer
from lora_align.train import token_rows as materials
from lora_align.train.checkpoints import Unfinished
from lora_align.train.row_files import LazyRows
from lora_align.train.stepper import Part, StepTrainer
from lora_align.train.token_rows import TokenRows

RISEN = 1.0  # nats a token by which a held-out loss rises when training has gone astray


def train_sft(recipe: Recipe, runs_dir: Path, screen: Screen, *, force: bool = False, resume: bool = False) -> Run:
    """Train and publish the adapter every preference then starts from."""
    recipe.check_trains("sft")
    assert recipe.sft is not None
    lora_trainer.check_trackers(recipe.sft)
    target = start_policy.folder(runs_dir)
    runs.refuse_busy(target)
    if not resume:
        runs.refuse_existing(target, force, "--runs DIR keeps both")
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    material = materials.read_token_texts(recipe.sft, base, screen)
    materials.report_dropped("sft", material.facts, screen)
    who = checkpoints.run_identity("sft", recipe, base, "", material.facts["fingerprint"])
    unfinished = Unfinished.of(target, who, resume=resume, force=force, screen=screen)
    if resume and (made := unfinished.published(target, screen)):
        return made
    about = Manifest(
        stage="sft",
        base=base.identity,
        recipe=recipe.as_dict(),
        contains_start=True,
        seeds={"init": (recipe.sft.lora or recipe.lora).init_seed, "data": recipe.sft.seed},
        data=material.facts,
    )
    with runs.staging_folder(target, screen, force=force) as staging, library_log(staging / LOG):
        lora = recipe.sft.lora or recipe.lora
        facts = train_adapter(base.load(), base, lora, recipe.sft, material, "sft", staging, unfinished, screen)
        published = runs.publish(staging, target, replace(about, **facts))
        unfinished.clear()
    lora_trainer.warn_unconverged(published, screen)
    return published


def summary(run: Run) -> str:
    """A run in one line."""
    held_out = run.manifest.metrics["held_out"]
    if not held_out["rows"]:
        return f"{run.path}  no rows held out, nothing measured"
    rows = count(held_out["rows"], "row")
    return f"{run.path}  held-out loss {held_out['loss_before']:.3f} → {held_out['loss']:.3f} ({rows})"


def packed(rows: Sequence[TokenText], settings: Sft | Rsf, base: Base) -> LazyRows[Sequence[TokenText]]:
    """What a step's rows are: texts side by side where the recipe packs them, else each by itself."""
    packs = [[i] for i in range(len(rows))]
    if settings.packing:
        packs = tokenise.pack([len(row.ids) for row in rows], min(settings.max_length, base.max_length))
    return LazyRows(len(packs), lambda pack: [rows[i] for i in packs[pack]])


def train_adapter(
    model: PreTrainedModel,
    base: Base,
    lora: Lora,
    settings: Sft | Rsf,
    material: TokenRows[TokenText],
    label: str,
    folder: Path,
    unfinished: Unfinished,
    screen: Screen,
) -> dict[str, Any]:
    """Train an adapter on a start policy into a folder; the manifest's fields about it."""
    with lora_trainer.accepted_by_libraries():
        trainer = SteppingSFTTrainer(
            objective=SftLoss(Reader.of(model), base.chat),
            rows=packed(material.train, settings, base),
            room=MemoryBudget(settings.tokens_per_batch, lora_trainer.TOO_LONG),
            unfinished=unfinished,
            tell=lambda text: screen.note(f"{label}: {text}"),
            model=model,
            args=SFTConfig(**lora_trainer.arguments(settings, base, folder, label)),
            processing_class=base.chat.tokenizer,
            peft_config=lora_trainer.fresh_adapter(lora, base),
        )
    initial = lora_trainer.initialise(trainer.model, lora.init_seed)
    watch = lora_trainer.fit(trainer, settings, screen, label)
    lora_trainer.save_adapter(trainer.model, folder)
    held_out = material.held_out[: lora_trainer.EVALUATE_AT_MOST]
    learned = held_out_loss(trainer.model, held_out, 2 * trainer.room.size)
    metrics = {
        "steps": trainer.state.global_step,
        "held_out": learned,
        "seconds": round(watch.seconds, 1),
    }
    lora_trainer.draw_curve(watch.history, label, folder / "curve.png")
    return {"initial_adapter": initial, "metrics": metrics, "unconverged": unconverged(learned)}


class SteppingSFTTrainer(StepTrainer[Sequence[TokenText]], SFTTrainer):
    """TRL's trainer, with steps made here."""


@dataclass(frozen=True)
class SftLoss:
    """−log π of every token that is to be learned, the mean over a step's; a row is a pack of one or more texts."""

    reader: Reader
    chat: ChatFormat

    def length(self, row: Sequence[TokenText]) -> int:
        """Of all its texts."""
        return sum(len(text.ids) for text in row)

    def weights(self, rows: Sequence[Sequence[TokenText]]) -> list[float]:
        """Every token counts alike; no text is to predict the next one's first."""
        learned = (label != IGNORED for row in rows for text in row for label in text.labels[1:])
        return [float(max(sum(learned), 1))]

    def part(self, rows: Sequence[Sequence[TokenText]], weights: Sequence[float]) -> Part:
        """Some packs of a step."""
        texts = [text for pack in rows for text in pack]
        labels = [label for text in texts for label in (*text.labels[1:], IGNORED)]
        at = [place for place, label in enumerate(labels) if label != IGNORED]
        states = self.reader.backbone.states([[text.ids] for text in texts])
        found, hits = self.reader.predicted(states, at, [labels[place] for place in at])
        return Part(-found.sum() / weights[0], {"accuracy": (hits.sum(), float(len(at)))})

    def quoted(self, row: Sequence[TokenText]) -> str:
        """How its first text begins."""
        return self.chat.opening(row[0].ids)


def held_out_loss(policy: PeftModel, rows: Sequence[TokenText], tokens: int) -> dict[str, float]:
    """Nats a token on unseen prompts, before and after."""
    learned = [_answer_apart(row) for row in rows]
    count = sum(len(answer) for _, (answer,) in learned)
    if not count:
        return {"rows": 0}
    policy.eval()
    after = -float(answer_logprobs(base_model_of(policy), learned, MemoryBudget(tokens)).sum()) / count
    with policy.disable_adapter():
        before = -float(answer_logprobs(base_model_of(policy), learned, MemoryBudget(tokens)).sum()) / count
    return {"rows": len(rows), "loss_before": before, "loss": after}


def unconverged(held_out: Mapping[str, float]) -> tuple[str, ...]:
    """A start policy that finds unseen answers no likelier than the base did has learned nothing, or diverged."""
    if not held_out["rows"] or held_out["loss"] < held_out["loss_before"]:
        return ()
    figures = f"from {held_out['loss_before']:.3f} to {held_out['loss']:.3f}"
    if held_out["loss"] > held_out["loss_before"] + RISEN:
        return (f"{lora_trainer.DIVERGED}held-out loss rose {figures}; lower learning_rate, or epochs",)
    return (f"held-out loss did not fall: {figures}",)


def _answer_apart(row: TokenText) -> tuple[list[int], list[list[int]]]:
    """Everything up to the last unlearned token, and the answer behind it."""
    unlearned = [i for i, label in enumerate(row.labels) if label == IGNORED]
    start = unlearned[-1] + 1 if unlearned else 1
    return row.ids[:start], [row.ids[start:]]

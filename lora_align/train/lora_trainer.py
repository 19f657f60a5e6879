"""Train one adapter with a trainer of TRL or transformers: arguments, initial values, checkpoints, saving."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from lora_align import store
from lora_align.console import count
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.errors import RunFailedError, Stopped, UserError, first_line
from lora_align.model.base import Base, compute_dtype, device
from lora_align.model.base_folder import GGUF
from lora_align.model.compiled_layers import compiled_layers
from lora_align.model.logprobs import Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.nf4 import dense_weight
from lora_align.recipe import Dpo, Lora, Training
from lora_align.runs import DIVERGED, Manifest
from lora_align.train.checkpoints import CHECKPOINTS_STORED, Checkpoints
from lora_align.train.job import Job, Row, Target
from lora_align.train.step_recorder import PROGRESS_NAMES, StepRecorder, StopSignal
from lora_align.train.stepper import METRICS, Loss, StepInputs, StepTrainer, trainable, with_padding

STATE_BYTES = 12  # in a checkpoint, per trained parameter: its float32 value and Adam's two moments
HUGE_UPDATE = 0.5  # ‖Δ‖/‖W‖ above which little of the base is left
MEASURE_AT_MOST = 256  # held-out rows measured at the end of a run
FEW_STEPS = 10  # optimizer steps; with fewer, an adapter learns hardly anything
OUT_OF_MEMORY_ADVICE = "lower max_length or lora.rank"


def arguments(settings: Training, base: Base, folder: Path, label: str) -> dict[str, Any]:
    """Return keyword arguments for a TRL configuration. They replace defaults that hide a fault or write a file."""
    dtype = compute_dtype(base.recipe)
    on_gpu = device(base.recipe).type != "cpu"
    return {
        "output_dir": str(folder / "trainer"),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,  # rows of one step over all ranks
        "remove_unused_columns": False,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": settings.max_length,
        "optim": settings.optimizer,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "bf16": on_gpu and dtype == torch.bfloat16,  # TRL's default is True, on a CPU as well
        "fp16": on_gpu and dtype == torch.float16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # True would show a NaN loss as the last finite one
        "save_strategy": "no",
        "run_name": label,
        "project": "lora-align",  # for trackio
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
    }


def too_few_pairs(pairs: int) -> str:
    """Return the message that there are too few held-out pairs to judge a run."""
    return (
        f"{count(pairs, 'held-out pair')}: too few to judge a run ({MIN_HELD_OUT} are needed); use more prompts, or "
        "raise dpo.held_out"
    )


def too_few_steps(rows: int, settings: Training) -> str:
    """Return a warning if these rows make too few optimizer steps to learn from, else ""."""
    steps = math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)
    if steps >= FEW_STEPS:
        return ""
    what = "pair" if isinstance(settings, Dpo) else "row"
    return (
        f"{count(steps, 'optimizer step')} ({count(rows, what)}): too few to learn much; use more {what}s, a smaller "
        f"batch_size (now {settings.batch_size}) or more epochs (now {settings.epochs:g})"
    )


def adapter_config(lora: Lora, base: Base) -> LoraConfig:
    """Return the configuration of a new adapter; `initialise` sets its values."""
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    name = base.recipe.model
    if "/" not in name or name.endswith(GGUF):
        name = str(base.folder)  # PEFT loads a folder, but neither a registered base nor a GGUF file
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        base_model_name_or_path=name,
        task_type="CAUSAL_LM",
    )


@contextmanager
def accepted_by_libraries() -> Iterator[None]:
    """Turn the errors with which TRL, PEFT or transformers refuse a recipe into a UserError."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError) as fault:
        raise UserError(f"the recipe cannot be trained: {first_line(fault)}") from fault


def check_trackers(settings: Training) -> None:
    """Refuse trackers whose library is not installed. Call this before slow work."""
    for tracker in settings.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ValueError, ImportError, RuntimeError) as fault:  # libraries report their absence differently
            raise UserError(f"the recipe cannot be trained: report_to {tracker!r}: {first_line(fault)}") from fault


def initialise(model: nn.Module, seed: int) -> str:
    """Set the adapter's initial values in float32, and return their hash.

    A depends only on the seed and the module's name, so every preference and direction starts from the same A.
    Otherwise the cosine of two vectors would be noise. TRL's constructor casts the weights to bfloat16, in which
    small updates are lost; float32 costs at most a few hundred megabytes.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(trainable(model)):
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        value = torch.zeros(parameter.shape)
        if side.startswith("A"):
            key = hashlib.sha256(f"{seed} {module}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
            bound = 1 / math.sqrt(parameter.shape[1])
            value = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
        parameter.data = value.to(parameter.device)
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def relative_size(model: PeftModel) -> tuple[float, float]:
    """Return ‖Δ‖ and ‖Δ‖/‖W‖ over the adapted layers."""
    delta = weights = 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            update: Tensor = module.get_delta_weight("default")  # type: ignore[operator]
            delta += float(update.float().square().sum())
            weights += float(dense_weight(module.base_layer).float().square().sum())
    return math.sqrt(delta), math.sqrt(delta / weights)


def too_large(relative_norm: float) -> list[str]:
    """Return a reason to doubt a run if the norm of its update, relative to the weights, is above HUGE_UPDATE."""
    return [f"the adapter is huge, ‖Δ‖/‖W‖ = {relative_norm:.2f}"] if relative_norm > HUGE_UPDATE else []


def diverged_by_size(relative_norm: float) -> tuple[str, ...]:
    """Return the reason of `too_large` as one for divergence, or () if there is none."""
    return tuple(f"{DIVERGED}{reason}; lower learning_rate" for reason in too_large(relative_norm))


@dataclass(frozen=True)
class Trained(Generic[Row]):
    """A trained adapter on its base, and the history of the training."""

    policy: PeftModel
    loss: Loss[Row]
    initial_adapter: str
    history: list[dict[str, float]]
    steps: int
    seconds: float
    tokens_at_once: int  # tokens of a part that fitted into memory, after any halving

    def describe(
        self, manifest: Manifest, metrics: Mapping[str, Any], unconverged: tuple[str, ...], *, enough_held_out: bool
    ) -> Manifest:
        """Return a manifest with the facts about this training."""
        seconds = round(self.seconds, 1)
        metrics = {"steps": self.steps, **metrics, "enough_held_out": enough_held_out, "seconds": seconds}
        return replace(manifest, initial_adapter=self.initial_adapter, metrics=metrics, unconverged=unconverged)


def train(
    job: Job[Row],
    model: PreTrainedModel,
    target: Target,
    checkpoints: Checkpoints,
    folder: Path,
    budget: MemoryBudget | None = None,
) -> Trained[Row]:
    """Train an adapter on a model, from the newest checkpoint if there is one, and save it to a folder."""
    with accepted_by_libraries():
        loss = job.loss(model, Reader.of(model))
        budget = budget or MemoryBudget(job.settings.tokens_per_batch, OUT_OF_MEMORY_ADVICE)
        steps = StepInputs(loss, job.rows, budget, checkpoints, target.note)
        settings = arguments(job.settings, job.base, folder, target.label)
        trainer = job.trainer(model, job.base, job.lora, settings, steps)
    initial = initialise(trainer.model, job.lora.init_seed)
    recorder = fit(trainer, job.settings, target)
    save_adapter(trainer.model, folder)
    draw_curve(recorder.history, target.label, folder / "curve.png")
    done = trainer.state.global_step
    return Trained(trainer.model, loss, initial, recorder.history, done, recorder.seconds, budget.size)


def fit(trainer: StepTrainer[Any], settings: Training, target: Target) -> StepRecorder:
    """Run the trainer with progress on the screen, a record of every step, and checkpoints."""
    parameters = sum(parameter.numel() for _, parameter in trainable(trainer.model))
    if settings.compile:
        trainer.loss = with_padding(trainer.loss)
    checkpoints = trainer.checkpoints = replace(trainer.checkpoints, bytes_each=STATE_BYTES * parameters)
    checkpoint = checkpoints.begin(target.screen)
    needed = (CHECKPOINTS_STORED + 1 - checkpoints.count) * STATE_BYTES * parameters
    store.check_free_space(checkpoints.folder, needed, "--runs DIR writes elsewhere")
    done = 0
    if checkpoint:
        shutil.copyfile(checkpoint / METRICS, trainer.metrics_file)
        done = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
        target.note(f"continues after step {done}")
    steps = math.ceil(len(trainer.get_train_dataloader()) * trainer.args.num_train_epochs)
    if few := too_few_steps(trainer.rows_each_epoch, settings):
        target.warn(few)
    with target.screen.progress(target.label, steps, done) as progress, StopSignal(target.screen) as stop:
        recorder = StepRecorder(progress, trainer.metrics_file, stop, 60 * settings.save_minutes)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(recorder)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(checkpoints.tensorboard_folder)
        try:
            with compiled_layers(trainer.model, wanted=settings.compile):
                if checkpoint and done >= steps:
                    trainer.restore(checkpoint)
                else:
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except OSError as fault:
            raise RunFailedError(f"{checkpoints.folder}: {first_line(fault)}; {checkpoints.remaining()}") from fault
    if recorder.stopped:
        raise Stopped(recorder.stopped, has_checkpoint=True)
    return recorder


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save a PEFT adapter, without PEFT's README and the trainer's folder."""
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except (OSError, SafetensorError) as fault:
        remedy = "nothing was published, and --resume continues from the last checkpoint"
        raise RunFailedError(f"{folder}: the adapter could not be written ({first_line(fault)}); {remedy}") from fault
    (folder / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def unwrap(model: PeftModel) -> PreTrainedModel:
    """Return the base without the adapter, gradient checkpointing and TRL's patched forward."""
    base = model.unload()
    base.__dict__.pop("forward", None)
    if base.is_activation_checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    return base  # type: ignore[no-any-return]


def draw_curve(history: list[dict[str, float]], title: str, file: Path) -> None:
    """Draw each recorded figure of a run over the steps, in a panel of its own."""
    from lora_align.metrics import plots

    curves = {}
    for name in PROGRESS_NAMES:
        points = [(record["step"], record[name]) for record in history if name in record]  # a step may lack a figure
        if points:
            curves[name] = points
    plots.training_curves(file, curves, title)

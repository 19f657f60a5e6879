"""What every TRL trainer here shares: arguments, the fresh adapter, the watch over a run, and its records."""

import hashlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from lora_align import processes, runs
from lora_align.console import Progress, Screen, count
from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.errors import RunFailedError, Stopped, UserError, first_line
from lora_align.model.base import Base, compute_dtype, device
from lora_align.model.compiled_layers import compiled_layers
from lora_align.model.nf4 import dense_weight
from lora_align.recipe import Dpo, Lora, Training
from lora_align.runs import Run
from lora_align.train.checkpoints import KEPT
from lora_align.train.stepper import METRICS, StepTrainer, trainable, with_padding

STATE_BYTES = 12  # a trained value, and the two moments that Adam keeps of it
# in short, as a line of progress has to fit 80 columns
SHOWN = {"loss": "loss", "margin": "margin", "accuracy": "acc", "error": "error", "lm": "lm"}
RECORDED = (*SHOWN, "chosen_reward", "rejected_reward")
EVALUATE_AT_MOST = 256  # held-out rows measured at the end of a run
FEW_STEPS = 10  # optimiser steps in which hardly anything is learned
DIVERGED = "diverged: "  # begins a reason of a run that left what it was to learn
TOO_LONG = "a smaller max_length, or lora.rank, may fit"


def arguments(settings: Training, base: Base, folder: Path, label: str) -> dict[str, Any]:
    """Arguments for any TRL configuration. Nothing is left to defaults that hide a fault or write a file."""
    dtype = compute_dtype(base.recipe)
    on_gpu = device().type == "cuda"
    return {
        "output_dir": str(folder / "trainer"),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,  # of all processes together: steps part it
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
        "logging_nan_inf_filter": False,  # by default a NaN loss is shown as the last good one
        "save_strategy": "no",
        "run_name": label,
        "project": "lora-align",  # in trackio; the others have settings of their own
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
    }


def too_few_pairs(pairs: int) -> str:
    """Say that so many held-out pairs measure nothing."""
    return (
        f"{count(pairs, 'held-out pair')}: too few to judge a run by (at least {MIN_HELD_OUT} are needed); take more "
        "prompts, a larger dpo.limit, or a larger dpo.held_out"
    )


def too_few_steps(rows: int, settings: Training) -> str:
    """Say that so many rows make too few optimiser steps to learn from; nothing where they are enough."""
    steps = math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)
    if steps >= FEW_STEPS:
        return ""
    what = "pair" if isinstance(settings, Dpo) else "row"
    return (
        f"{count(rows, what)} make {count(steps, 'optimiser step')}, in which little is learned: more {what}s, a "
        f"smaller batch_size "
        f"(now {settings.batch_size}), or more epochs (now {settings.epochs:g})"
    )


def warn_unconverged(run: Run, screen: Screen) -> None:
    """Say why a run may have learned nothing, or something else than it was to."""
    for reason in run.manifest.unconverged:
        screen.warn(f"{run.path}: {reason if reason.startswith(DIVERGED) else f'unconverged: {reason}'}")


def fresh_adapter(lora: Lora, base: Base) -> LoraConfig:
    """The configuration of a new adapter; its values are set by `initialise`."""
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    name = base.recipe.model if "/" in base.recipe.model else str(base.folder)
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
    """While a trainer is built: what TRL, PEFT or transformers refuse of a recipe is refused before work began."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError) as fault:
        raise UserError(f"the recipe cannot be trained: {first_line(fault)}") from fault


def check_trackers(settings: Training) -> None:
    """Refuse trackers whose library is not installed, before anything is read."""
    for tracker in settings.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ValueError, ImportError, RuntimeError) as fault:  # how each library says that it is not there
            raise UserError(f"the recipe cannot be trained: report_to {tracker!r}: {first_line(fault)}") from fault


def initialise(model: nn.Module, seed: int) -> str:
    """Give the trainable adapter its first values, in float32, and return their hash.

    A depends on the seed and its module's name alone, so that every preference and direction starts from
    one A: otherwise the cosine of two vectors would be noise. TRL's constructor has cast the weights to
    bfloat16, where small steps are lost; float32 costs a few hundred megabytes at most, on any device.
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
    """‖Δ‖ and ‖Δ‖/‖W‖ over the layers the adapter sits on."""
    delta = weights = 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            update: Tensor = module.get_delta_weight("default")  # type: ignore[operator]
            delta += float(update.float().square().sum())
            weights += float(dense_weight(module.base_layer).float().square().sum())
    return math.sqrt(delta), math.sqrt(delta / weights)


class StepRecorder(TrainerCallback):
    """Records every step and shows some of it."""

    def __init__(self, progress: Progress, records: Path, stop: "StopSignal", save_seconds: float) -> None:
        self.progress, self.records, self.stop, self.save_seconds = progress, records, stop, save_seconds
        self.started = self.saved = time.monotonic()
        self.stopped = 0  # by which signal
        self.history: list[dict[str, float]] = []
        if records.exists():  # of the part that was done before
            self.history = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        self.tokens_before = self.history[-1]["tokens"] if self.history else 0.0

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.started

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        """A checkpoint now and then, one behind the last step, as measuring may fail, and one before an end that was
        asked for: of all processes, or of none."""
        due = time.monotonic() - self.saved >= self.save_seconds or state.global_step >= state.max_steps
        told = processes.all_gather((self.stop.signal, due))
        self.stopped = max(signal for signal, _ in told)
        if self.stopped or told[0][1]:
            control.should_save, self.saved = True, time.monotonic()
        control.should_training_stop |= bool(self.stopped)

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        """One line of figures a step."""
        if "loss" not in logs:
            return
        tokens = float(logs.get("num_tokens", 0.0))
        rate = (tokens - self.tokens_before) / max(self.seconds, 1e-9)
        record = {"step": state.global_step, **{name: float(logs[name]) for name in RECORDED if name in logs}}
        record |= {"learning_rate": float(logs["learning_rate"]), "tokens": tokens, "tokens_per_second": round(rate)}
        self.history.append(record)
        with self.records.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        shown = {short: f"{record[name]:.3f}" for name, short in SHOWN.items() if name in record}
        self.progress.show(state.global_step, {**shown, "tok/s": f"{rate:,.0f}"})


class StopSignal:
    """The first SIGINT or SIGTERM is noted, so that a step can be finished; the second does what it always does."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.signal = screen, 0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._noted) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _noted(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.screen.note("finishing the step at hand, then keeping all; once more, and it ends at once")
        self.__exit__()


def fit(trainer: StepTrainer[Any], settings: Training, screen: Screen, what: str) -> StepRecorder:
    """Train, from the newest checkpoint on if there is one; progress on the screen, and a record in the folder."""
    parameters = sum(parameter.numel() for _, parameter in trainable(trainer.model))
    if settings.compile:
        trainer.objective = with_padding(trainer.objective)
    trainer.unfinished = replace(trainer.unfinished, bytes_each=STATE_BYTES * parameters)
    begun = trainer.unfinished.begin(screen)
    needed = (KEPT + 1 - trainer.unfinished.count) * STATE_BYTES * parameters
    runs.check_room(trainer.unfinished.folder, needed, "--runs DIR writes elsewhere")
    done = 0
    if begun:
        shutil.copyfile(begun / METRICS, trainer.records)
        done = json.loads((begun / TRAINER_STATE_NAME).read_text())["global_step"]
        screen.note(f"{what}: goes on after step {done}")
    steps = math.ceil(len(trainer.get_train_dataloader()) * trainer.args.num_train_epochs)
    if few := too_few_steps(trainer.rows_each_epoch, settings):
        screen.warn(f"{what}: {few}")
    with screen.progress(what, steps, done) as progress, StopSignal(screen) as stop:
        watch = StepRecorder(progress, trainer.records, stop, 60 * settings.save_minutes)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(trainer.unfinished.events)
        try:
            with compiled_layers(trainer.model, wanted=settings.compile):
                if begun and done >= steps:
                    trainer.take(begun)
                else:
                    trainer.train(resume_from_checkpoint=str(begun) if begun else None)
        except OSError as fault:
            raise RunFailedError(f"{fault}; {trainer.unfinished.kept()}") from fault
    if watch.stopped:
        raise Stopped(watch.stopped)
    return watch


def save_adapter(model: PeftModel, folder: Path) -> None:
    """An ordinary PEFT adapter, and nothing beside it."""
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except (OSError, SafetensorError) as fault:
        kept = "nothing of it was published, and --resume goes on from the last checkpoint"
        raise RunFailedError(f"{folder}: the adapter could not be written ({first_line(fault)}); {kept}") from fault
    (folder / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def unwrap(model: PeftModel) -> PreTrainedModel:
    """The base as it was before the trainer: adapter, checkpointing and TRL's patched forward gone."""
    base = model.unload()
    base.__dict__.pop("forward", None)
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    return base  # type: ignore[no-any-return]


def draw_curve(history: list[dict[str, float]], title: str, file: Path) -> None:
    """Draw the recorded figures of a run over its steps, one panel each."""
    from lora_align.metrics import plots

    curves = {name: [record[name] for record in history] for name in SHOWN if name in history[0]}
    plots.training_curves(file, [record["step"] for record in history], curves, title)

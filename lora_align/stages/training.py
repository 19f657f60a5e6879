"""What every TRL trainer here shares: arguments, the fresh adapter, the watch over a run, and its records."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from lora_align.console import Progress, Screen
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.base import Base, compute_dtype, device
from lora_align.recipe import Lora, Training

METRICS = "metrics.jsonl"
# in short, as a line of progress has to fit 80 columns
SHOWN = {"loss": "loss", "margin": "margin", "accuracy": "acc", "error": "error", "lm": "lm"}
EVALUATE_AT_MOST = 256  # held-out rows measured at the end of a run


def arguments(settings: Training, base: Base, folder: Path) -> dict[str, Any]:
    """Arguments for any TRL configuration. Nothing is left to defaults that hide a fault or write a file."""
    dtype = compute_dtype(base.recipe)
    on_gpu = device().type == "cuda"
    return {
        "output_dir": str(folder / "trainer"),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
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
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
    }


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
    except RuntimeError as fault:
        if "requires" not in str(fault):  # a tracker that is not installed, and nothing else
            raise
        raise UserError(f"the recipe cannot be trained: {fault}") from fault


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


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimiser will move."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def relative_size(model: PeftModel) -> tuple[float, float]:
    """‖Δ‖ and ‖Δ‖/‖W‖ over the layers the adapter sits on."""
    delta = weights = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            update = module.get_delta_weight("default")
            delta += float(update.float().square().sum())
            weights += float(_dense(module.base_layer).float().square().sum())
    return math.sqrt(delta), math.sqrt(delta / weights)


def _dense(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(layer.weight, "quant_state", None)
    return layer.weight if state is None else dequantize_4bit(layer.weight.data, state)  # type: ignore[return-value]


class Watch(TrainerCallback):
    """Records every step and shows some of it, and stops a run before a step that is not finite."""

    def __init__(self, progress: Progress, folder: Path, figures: Mapping[str, str], finite: bool) -> None:
        self.progress, self.figures, self.finite = progress, figures, finite
        self.records = folder / METRICS
        self.tokens, self.started = 0.0, time.monotonic()
        self.history: list[dict[str, float]] = []
        self.trained: list[nn.Parameter] = []

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.started

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        """A gradient that is not finite would spoil every weight at once."""
        self.trained = self.trained or [parameter for _, parameter in trainable(model)]
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        if self.finite and not get_total_norm(gradients).isfinite():
            raise RunFailedError(
                f"step {state.global_step + 1}: a gradient is not finite, the run is stopped before it does harm; "
                "try a lower learning_rate, or look for odd rows"
            )

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        """One line of figures a step."""
        if "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            raise RunFailedError(f"step {state.global_step}: the loss is not finite; try a lower learning_rate")
        tokens = float(logs.get("num_tokens", 0.0))
        rate = tokens / max(self.seconds, 1e-9)
        record = {"step": state.global_step, **{k: float(logs[v]) for k, v in self.figures.items() if v in logs}}
        record |= {"learning_rate": float(logs["learning_rate"]), "tokens": tokens, "tokens_per_second": round(rate)}
        self.history.append(record)
        with self.records.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        shown = {short: f"{record[name]:.3f}" for name, short in SHOWN.items() if name in record}
        self.progress.show(state.global_step, {**shown, "tok/s": f"{rate:,.0f}"})


@contextmanager
def watched(trainer: Trainer, screen: Screen, what: str, folder: Path, figures: Mapping[str, str]) -> Iterator[Watch]:
    """Progress on the screen and a record in the folder for as long as the trainer runs."""
    per_epoch = len(trainer.get_train_dataloader())
    steps = math.ceil(math.ceil(per_epoch / trainer.args.gradient_accumulation_steps) * trainer.args.num_train_epochs)
    with screen.progress(what, steps) as progress:
        watch = Watch(progress, folder, figures, finite=not trainer.args.fp16)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        yield watch


def save_adapter(model: PeftModel, folder: Path) -> None:
    """An ordinary PEFT adapter, and nothing beside it."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
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
    """The run's figures over its steps, one panel each, as a PNG."""
    from matplotlib.figure import Figure

    panels = [name for name in SHOWN if name in history[0]]
    picture = Figure(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for axis, name in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        steps, values = [r["step"] for r in history], [r[name] for r in history]
        axis.plot(steps, values, color="#b8c4d6", linewidth=1)
        axis.plot(steps, _smoothed(values), color="#1f4e9c", linewidth=2)
        axis.set(xlabel="step", title=name)
        axis.spines[["top", "right"]].set_visible(False)
    picture.suptitle(title, fontsize=11)
    picture.savefig(file, dpi=110)


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """An exponential mean, corrected for its start."""
    smooth, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**i))
    return smooth

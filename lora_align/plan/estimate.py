"""The memory and time of a whole stage on a device, from the cost of a step or a measured step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lora_align.metrics.histogram import histogram
from lora_align.model.base import Base
from lora_align.model.nf4 import fits_dequantised
from lora_align.plan.device import Device
from lora_align.plan.stages import Stage
from lora_align.plan.step_cost import Cost, Shape
from lora_align.plan.timing import StepTiming
from lora_align.recipe import Lora, Recipe
from lora_align.train import lora_trainer

PLACES = 64  # candidates for the fullest part, spread over the sorted rows
GATHERED = 2  # layers of a sharded base that are whole at the same time: the current and the next one
# bytes of optimizer state per trained value, by a part of the optimizer's name; 8 for all others
MOMENTS = {"8bit": 2, "sgd": 0}


@dataclass(frozen=True)
class StageEstimate:
    """The estimated memory, operations and time of a stage."""

    stage: Stage
    cost: Cost
    tokens: int
    judged: int  # tokens of the judged rows
    lengths: Sequence[int]
    part: Sequence[int]  # the rows of a step's fullest part
    device: Device
    gathered: float  # bytes of the layers that are whole at the same time if the base is sharded
    sharded: bool  # whether the base is sharded over the devices
    rate: float  # operations per second: a share of the device's rate, or measured
    measured: StepTiming | None = None  # timing of the fullest part of a step
    counted: float = 0.0  # bytes of activations and logits that were planned before the measurement

    @property
    def memory(self) -> dict[str, float]:
        """Return the bytes by kind of use."""
        moments = next((each for name, each in MOMENTS.items() if name in self.stage.settings.optimizer), 8)
        return {
            "weights": self._weights,
            "adapters": self.cost.trained,
            "optimizer": self.cost.trained * (1 + moments / 4) if self.stage.trains else 0.0,  # with gradients
            "activations": self.cost.activations,
            "logits": self.cost.logits,
            "reserved": self.device.reserved,
        }

    @property
    def _weights(self) -> float:
        if not self.sharded or self.device.count == 1:
            return self.cost.weights
        return self.cost.weights - self.cost.packed * (1 - 1 / self.device.count) + self.gathered

    @property
    def total(self) -> float:
        """Return the peak memory in bytes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.device.memory

    def scaled_to(self, step: StepTiming) -> "StageEstimate":
        """Return the estimate with memory and rate scaled to a measured step."""
        counted = self.cost.activations + self.cost.logits
        share = step.taken / counted
        cost = replace(self.cost, activations=share * self.cost.activations, logits=share * self.cost.logits)
        return replace(self, cost=cost, counted=counted, measured=step, rate=self.cost.whole / step.seconds)

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole stage, without communication between devices."""
        tokens = self.tokens * self.stage.settings.epochs * self.stage.passes
        each = sum(self.lengths[i] for i in self.part)
        forward = self.judged * self.stage.passes * self.stage.readings
        forward += (self.tokens + self.judged) * self.stage.referenced
        operations = (tokens * self.cost.whole + forward * self.cost.forward) / each
        return operations / self.rate / self.device.count + (self.measured.before if self.measured else 0)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        bytes_ = {name: round(value) for name, value in self.memory.items()}
        return {
            "stage": self.stage.name,
            "rows": len(self.lengths),
            "passes": self.stage.passes,
            "tokens": self.tokens,
            "judged_tokens": self.judged,
            "histogram": histogram(self.lengths),
            "assumed": self.stage.assumed,
            "answers": self.stage.sampling_work.answers if self.stage.sampling_work else 0,
            "bytes": bytes_,
            "total": round(self.total),
            "fits": self.fits,
            "rate": self.rate,
            "measured": {**asdict(self.measured), "planned": round(self.counted)} if self.measured else None,
            "part": sum(self.lengths[i] for i in self.part),
            "operations_a_token": self.cost.whole / sum(self.lengths[i] for i in self.part),
            "seconds": round(self.seconds),
        }


def shape_of(recipe: Recipe, base: Base, lora: Lora, device: Device, *, checkpointing: bool = False) -> Shape:
    """Return the shape of a base with an adapter, from the base's configuration alone."""
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if recipe.base.attention == "eager":  # all other kernels store as little as the default one
        config._attn_implementation = "eager"
    packed = recipe.base.quantization == "nf4"
    adapter = lora_trainer.adapter_config(lora, base)
    shape = Shape(config, device.dtype, packed, False, recipe.base.double_quant, adapter, checkpointing)
    dense = packed and device.cpu and not recipe.base.fsdp and fits_dequantised(shape.linears(), device.dtype)
    return replace(shape, dequantised=dense)


def estimate_stage(
    recipe: Recipe, base: Base, stage: Stage, device: Device, lengths: Sequence[int] | None = None
) -> StageEstimate:
    """Estimate a stage from the fullest part of its steps. `lengths` are the rows' lengths, if known already."""
    checkpointing = stage.settings.gradient_checkpointing
    shape = shape_of(recipe, base, stage.job.lora, device, checkpointing=checkpointing)
    loss = stage.loss(shape.outline())
    lengths = lengths or [loss.length(row) for row in stage.job.rows]
    judged = sum(loss.length(row) for row in stage.judged)
    part = fullest(lengths, stage.settings.tokens_per_batch, stage.settings.batch_size)
    rows = [stage.job.rows[i] for i in part]

    def step(model: PreTrainedModel) -> torch.Tensor:
        loss = stage.loss(model)
        return loss.part(rows, loss.weights(rows)).loss

    cost = shape.cost(step)
    gathered = GATHERED * cost.packed / shape.layers
    return StageEstimate(
        stage, cost, sum(lengths), judged, lengths, part, device, gathered, recipe.base.fsdp, device.share * device.rate
    )


def size(count: float, unit: str = "") -> str:
    """Format bytes: "5.70 GB", below one GB "340.1 MB", too little for the given unit "<0.01 GB"."""
    unit = unit or ("MB" if count < 1e9 else "GB")
    shown = f"{count / 1e6:,.1f}" if unit == "MB" else f"{count / 1e9:,.2f}"
    return f"{'<0.01' if count and shown == '0.00' else shown} {unit}"


def fullest(lengths: Sequence[int], budget: int, batch: int) -> list[int]:
    """Return the rows of a step's fullest part: rows of similar length with the most tokens within `budget`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = sorted({len(order) * place // PLACES for place in range(PLACES)})
    parts = (order[at : at + max(1, min(batch, budget // max(lengths[order[at]], 1)))] for at in starts)
    return max(parts, key=lambda part: sum(lengths[i] for i in part))

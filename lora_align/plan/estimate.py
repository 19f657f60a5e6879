"""What a stage takes: bytes by part, operations, seconds."""

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
from lora_align.train.stepper import Loss

SHARE = 0.5  # of a device's matrix rate that training is taken to reach; not measured on any card yet
PLACES = 64  # of the lengths at which the fullest part is looked for
GATHERED = 2  # layers of a divided base that are whole at once: one in use, and the next
MOMENTS = {"8bit": 2, "sgd": 0}  # bytes a trained value that optimisers of such a name keep; others: 8


@dataclass(frozen=True)
class StageEstimate:
    """A stage's plan: bytes by part, operations, seconds."""

    stage: Stage
    cost: Cost
    tokens: int
    lengths: Sequence[int]
    part: Sequence[int]  # which rows make the fullest part of a step
    device: Device
    gathered: float  # bytes of a base's layers that are whole at once where it is divided
    divided: bool  # among the devices
    rate: float  # operations a second: the share of the device's that is assumed, or as measured
    measured: StepTiming | None = None  # that part
    counted: float = 0.0  # the activations and logits that were planned before it was measured

    @property
    def memory(self) -> dict[str, float]:
        """By part."""
        kept = next((each for name, each in MOMENTS.items() if name in self.stage.settings.optimizer), 8)
        return {
            "weights": self._weights,
            "adapters": self.cost.trained,
            "optimiser": self.cost.trained * (1 + kept / 4) if self.stage.trains else 0.0,  # and the gradients
            "activations": self.cost.activations,
            "logits": self.cost.logits,
            "reserved": self.device.reserved,
        }

    @property
    def _weights(self) -> float:
        if not self.divided or self.device.count == 1:
            return self.cost.weights
        return self.cost.weights - self.cost.packed * (1 - 1 / self.device.count) + self.gathered

    @property
    def total(self) -> float:
        """Bytes at their highest."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """With all that is reserved."""
        return self.total <= self.device.memory

    def by(self, step: StepTiming) -> "StageEstimate":
        """As it is where a part of a step takes what was measured."""
        counted = self.cost.activations + self.cost.logits
        share = step.taken / counted
        taken = replace(self.cost, activations=share * self.cost.activations, logits=share * self.cost.logits)
        return replace(self, cost=taken, counted=counted, measured=step, rate=self.cost.whole / step.seconds)

    @property
    def seconds(self) -> float:
        """Of all the stage trains; what devices take to tell each other is not in it."""
        tokens = self.tokens * self.stage.settings.epochs * self.stage.passes
        each = sum(self.lengths[i] for i in self.part)
        operations = tokens * self.cost.whole / each
        operations += self.tokens * self.cost.forward / each if self.stage.referenced else 0
        return operations / self.rate / self.device.count + (self.measured.before if self.measured else 0)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "stage": self.stage.name,
            "rows": len(self.lengths),
            "passes": self.stage.passes,
            "tokens": self.tokens,
            "histogram": histogram(self.lengths),
            "assumed": self.stage.assumed,
            "answers": self.stage.drawing.answers if self.stage.drawing else 0,
            "bytes": {name: round(value) for name, value in self.memory.items()},
            "total": round(self.total),
            "fits": self.fits,
            "rate": self.rate,
            "measured": {**asdict(self.measured), "planned": round(self.counted)} if self.measured else None,
            "part": sum(self.lengths[i] for i in self.part),
            "operations_a_token": self.cost.whole / sum(self.lengths[i] for i in self.part),
            "seconds": round(self.seconds),
        }


def shape_of(recipe: Recipe, base: Base, lora: Lora, device: Device, *, checkpointing: bool = False) -> Shape:
    """A base with an adapter, by its configuration alone."""
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if recipe.base.attention == "eager":  # the others keep as little as what runs on any device does
        config._attn_implementation = "eager"
    packed = recipe.base.quantization == "nf4"
    adapter = lora_trainer.fresh_adapter(lora, base)
    shape = Shape(config, device.dtype, packed, False, recipe.base.double_quant, adapter, checkpointing)
    dense = packed and device.cpu and not recipe.base.fsdp and fits_dequantised(shape.linears(), device.dtype)
    return replace(shape, dequantised=dense)


def estimate_stage(
    recipe: Recipe, base: Base, stage: Stage, device: Device, lengths: Sequence[int] | None = None
) -> StageEstimate:
    """What the fullest part of a stage's steps takes; its rows' lengths, where they are known, are not looked up."""
    checkpointing = stage.settings.gradient_checkpointing
    shape = shape_of(recipe, base, stage.lora, device, checkpointing=checkpointing)
    lengths = lengths or _lengths(stage, stage.objective(shape.outline()))
    part = fullest(lengths, stage.settings.tokens_per_batch, stage.settings.batch_size)
    rows = [stage.rows[i] for i in part]

    def step(model: PreTrainedModel) -> torch.Tensor:
        objective = stage.objective(model)
        return objective.part(rows, objective.weights(rows)).loss

    cost = shape.cost(step)
    gathered = GATHERED * cost.packed / shape.layers
    return StageEstimate(
        stage, cost, sum(lengths), lengths, part, device, gathered, recipe.base.fsdp, SHARE * device.rate
    )


def size(count: float, unit: str = "") -> str:
    """Bytes as tables and advice give them: 5.70 GB, 340.1 MB below one GB; too few for a table's unit: <0.01."""
    unit = unit or ("MB" if count < 1e9 else "GB")
    shown = f"{count / 1e6:,.1f}" if unit == "MB" else f"{count / 1e9:,.2f}"
    return f"{'<0.01' if count and shown == '0.00' else shown} {unit}"


def _lengths(stage: Stage, objective: Loss[Any]) -> list[int]:
    return [objective.length(row) for row in stage.rows]


def fullest(lengths: Sequence[int], budget: int, batch: int) -> list[int]:
    """The rows of a step that make its fullest part: as many alike long ones as the budget takes."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = sorted({len(order) * place // PLACES for place in range(PLACES)})
    found = (order[at : at + max(1, min(batch, budget // max(lengths[order[at]], 1)))] for at in starts)
    return max(found, key=lambda part: sum(lengths[i] for i in part))

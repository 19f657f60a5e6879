"""Before a run: what each stage will take in memory and time, whether it fits, and what to change where it does not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lora_align.console import Screen, clock, table
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.weightless import Cost, Shape
from lora_align.plan.device import Device, device_of
from lora_align.plan.measure import Measured, measured
from lora_align.plan.stage import Stage, stage_of
from lora_align.recipe import Lora, Recipe, Training
from lora_align.stages import audit, training
from lora_align.stages.steps import Objective

STAGES = ("sft", "dpo", "reward", "rsf")
SHARE = 0.5  # of a device's matrix rate that training is taken to reach; not measured on any card yet
SMALL_ADAM = "adamw_8bit"
LOWEST_RANK = 4  # that is advised
PLACES = 64  # of the lengths at which the fullest part is looked for
MOMENTS = {"8bit": 2, "sgd": 0}  # bytes a trained value that optimisers of such a name keep; others: 8


@dataclass(frozen=True)
class Found:
    """A stage's plan: bytes by part, operations, seconds."""

    stage: Stage
    cost: Cost
    tokens: int
    lengths: Sequence[int]
    part: Sequence[int]  # which rows make the fullest part of a step
    device: Device
    rate: float  # operations a second: the share of the device's that is assumed, or as measured
    measured: Measured | None = None  # that part

    @property
    def memory(self) -> dict[str, float]:
        """By part."""
        kept = next((each for name, each in MOMENTS.items() if name in self.stage.settings.optimizer), 8)
        return {
            "weights": self.cost.weights,
            "adapters": self.cost.trained,
            "optimiser": self.cost.trained * (1 + kept / 4),  # and the gradients
            "activations": self.cost.activations,
            "logits": self.cost.logits,
            "reserved": self.device.reserved,
        }

    @property
    def total(self) -> float:
        """Bytes at their highest."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """With all that is reserved."""
        return self.total <= self.device.memory

    @property
    def seconds(self) -> float:
        """Of all the stage trains."""
        tokens = self.tokens * self.stage.settings.epochs * self.stage.passes
        each = sum(self.lengths[i] for i in self.part)
        operations = tokens * self.cost.whole / each
        operations += self.tokens * self.cost.forward / each if self.stage.referenced else 0
        return operations / self.rate

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "stage": self.stage.name,
            "rows": len(self.lengths),
            "passes": self.stage.passes,
            "tokens": self.tokens,
            "histogram": audit.histogram(self.lengths),
            "assumed": self.stage.assumed,
            "bytes": {name: round(value) for name, value in self.memory.items()},
            "total": round(self.total),
            "fits": self.fits,
            "rate": self.rate,
            "measured": asdict(self.measured) if self.measured else None,
            "part": sum(self.lengths[i] for i in self.part),
            "operations_a_token": self.cost.whole / sum(self.lengths[i] for i in self.part),
            "seconds": round(self.seconds),
        }


def run(
    recipe: Recipe,
    names: Sequence[str],
    screen: Screen,
    *,
    card: str = "",
    vram: float | None = None,
    passes: int | None = None,
    measure: bool = False,
) -> dict[str, Any]:
    """Plan the stages that a recipe has, or those of them that are named; how often over the rows, if not as usual.

    To `measure`, a step of each is taken on this device.
    """
    base = bases.find(recipe.base, outline=not measure)
    device = device_of(recipe, card, vram)
    found = []
    for name in names:
        stage = stage_of(recipe, name, base, screen)
        if stage is not None:
            plan = planned(recipe, base, replace(stage, passes=passes or stage.passes), device)
            if measure and plan.fits:
                screen.note(f"{name}: taking a step")
                step = measured(base, stage, [stage.rows[i] for i in plan.part])
                plan = replace(plan, measured=step, rate=plan.cost.whole / step.seconds)
            said = quicker(recipe, base, plan) if plan.fits else advice(recipe, base, plan)
            found.append({**plan.facts(), "advice": said})
    if not found:
        raise UserError(f"the recipe has no {' or '.join(names)} to plan")
    return {
        "base": base.identity["model"],
        "parameters": _shape(recipe, base, recipe.lora, device).parameters(),
        "device": {**asdict(device), "dtype": str(device.dtype).removeprefix("torch.")},
        "stages": found,
    }


def told(plan: Mapping[str, Any], *, lengths: bool = False) -> str:
    """A table by part, then what it comes to; how long the rows are, if asked for."""
    device = plan["device"]
    parts = [
        f"{plan['base']}: {plan['parameters'] / 1e9:,.3g} billion parameters, on {device['name']} with "
        f"{device['memory'] / 1e9:,.0f} GB, in {device['dtype']}"
    ]
    names = list(plan["stages"][0]["bytes"])
    rows = [
        [of["stage"], *(_gigabytes(of["bytes"][name]) for name in names), _gigabytes(of["total"])]
        for of in plan["stages"]
    ]
    parts.append(table(["GB", *names, "at most"], rows))
    for of in plan["stages"]:
        often = f"{of['passes']} times over " if of["passes"] > 1 else ""
        line = f"{of['stage']}: {'fits' if of['fits'] else 'does not fit'}; {often}{of['rows']:,} rows, "
        line += f"{of['tokens']:,} tokens: about {clock(of['seconds'])}"
        parts.append("\n".join(filter(None, [line, of["assumed"], of["advice"], _measured(of, device)])))
        if lengths:
            parts.append("\n".join(["tokens of a row, prompt and answers:", *audit.bars(of["histogram"])]))
    if not all(of["measured"] for of in plan["stages"]):
        parts.append(f"Times are at {SHARE:.0%} of the device's matrix rate, {device['rate'] / 1e12:,.3g} TFLOP/s.")
    return "\n\n".join(parts)


def _measured(of: Mapping[str, Any], device: Mapping[str, Any]) -> str:
    if not of["measured"]:
        return ""
    said, took = of["bytes"]["activations"] + of["bytes"]["logits"], of["measured"]["taken"]
    return (
        f"a step's fullest part took {of['measured']['seconds']:,.2f} s, {of['rate'] / device['rate']:.0%} of the "
        f"device's matrix rate; activations and logits {_gigabytes(took)} GB, planned {_gigabytes(said)} GB"
    )


def resolved(recipe: Recipe) -> str:
    """Every value that is in force, a line each, as --set would say it."""
    return "\n".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in _flat(recipe.as_dict()))


def _flat(table_: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table_.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"


# --- what it takes ---


def _shape(
    recipe: Recipe, base: Base, lora: Lora, device: Device, *, checkpointing: bool = False, several: bool = False
) -> Shape:
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    packed = recipe.base.quantization == "nf4"
    adapter = training.fresh_adapter(lora, base)
    return Shape(config, device.dtype, packed, recipe.base.double_quant, adapter, checkpointing, several)


def planned(recipe: Recipe, base: Base, stage: Stage, device: Device, lengths: Sequence[int] | None = None) -> Found:
    """What the fullest part of a stage's steps takes; its rows' lengths, where they are known, are not looked up."""
    several = getattr(stage.settings, "packing", False)
    checkpointing = stage.settings.gradient_checkpointing
    shape = _shape(recipe, base, stage.lora, device, checkpointing=checkpointing, several=several)
    lengths = lengths or _lengths(stage, stage.objective(shape.outline()))
    part = fullest(lengths, stage.settings.tokens_per_batch, stage.settings.batch_size)
    rows = [stage.rows[i] for i in part]

    def step(model: PreTrainedModel) -> torch.Tensor:
        objective = stage.objective(model)
        return objective.part(rows, objective.weights(rows)).loss

    return Found(stage, shape.cost(step), sum(lengths), lengths, part, device, SHARE * device.rate)


def _lengths(stage: Stage, objective: Objective[Any]) -> list[int]:
    return [objective.length(row) for row in stage.rows]


def fullest(lengths: Sequence[int], budget: int, batch: int) -> list[int]:
    """The rows of a step that make its fullest part: as many alike long ones as the budget takes."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = sorted({len(order) * place // PLACES for place in range(PLACES)})
    parts = (order[at : at + max(1, min(batch, budget // max(lengths[order[at]], 1)))] for at in starts)
    return max(parts, key=lambda part: len(part) * lengths[part[0]])


def advice(recipe: Recipe, base: Base, plan: Found) -> str:
    """The first change that makes it fit."""
    for said, settings, lora in _changes(plan.stage):
        changed = replace(plan.stage, settings=settings, lora=lora)
        found = replace(planned(recipe, base, changed, plan.device, plan.lengths), rate=plan.rate)
        if found.fits:
            return f"it fits with{said}: {_gigabytes(found.total)} GB, about {clock(found.seconds)}"
    return "no tokens_per_batch, gradient_checkpointing, optimizer or lora.rank makes it fit: a smaller base will"


def quicker(recipe: Recipe, base: Base, plan: Found) -> str:
    """What costs time and is not needed for it to fit."""
    if not plan.stage.settings.gradient_checkpointing:
        return ""
    kept = replace(plan.stage, settings=replace(plan.stage.settings, gradient_checkpointing=False))
    found = replace(planned(recipe, base, kept, plan.device, plan.lengths), rate=plan.rate)
    if not found.fits:
        return ""
    said = f"--set {plan.stage.name}.gradient_checkpointing=false"
    return f"quicker, and it fits, with {said}: {_gigabytes(found.total)} GB, about {clock(found.seconds)}"


def _changes(stage: Stage) -> Iterator[tuple[str, Training, Lora]]:
    """Smaller parts, then checkpointing by itself, then both, then Adam's moments in 8 bit, then a lower rank as well;
    and how to say it."""
    settings, lora = stage.settings, stage.lora
    parts, both = "", ""
    while settings.tokens_per_batch > settings.max_length:
        settings = replace(settings, tokens_per_batch=settings.tokens_per_batch // 2)
        parts = both = f" --set {stage.name}.tokens_per_batch={settings.tokens_per_batch}"
        yield parts, settings, lora
    if not settings.gradient_checkpointing:
        checkpointing = f" --set {stage.name}.gradient_checkpointing=true"
        yield checkpointing, replace(stage.settings, gradient_checkpointing=True), lora
        settings, both = replace(settings, gradient_checkpointing=True), parts + checkpointing
        yield both, settings, lora
    if settings.optimizer.startswith("adamw_torch"):
        settings, both = replace(settings, optimizer=SMALL_ADAM), f"{both} --set {stage.name}.optimizer={SMALL_ADAM}"
        yield both, settings, lora
    table_of_its_own = f"{stage.name}." if getattr(settings, "lora", None) else ""
    while lora.rank > LOWEST_RANK:
        lora = replace(lora, rank=lora.rank // 2)
        yield f"{both} --set {table_of_its_own}lora.rank={lora.rank}", settings, lora

"""Before a run: what each stage will take in memory and time, whether it fits, and what to change where it does not."""

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lora_align.console import Screen, clock, table
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model import material as materials
from lora_align.model.base import Base, compute_dtype
from lora_align.model.logprobs import Reader
from lora_align.model.material import View, joined
from lora_align.model.reward_model import Heads
from lora_align.model.tokenise import TokenPair, TokenText
from lora_align.model.weightless import Cost, Shape
from lora_align.recipe import Lora, Recipe, Training
from lora_align.stages import audit, dpo, judging, reward, sft, training
from lora_align.stages.steps import Objective

STAGES = ("sft", "dpo", "reward", "rsf")
CARDS = {  # memory in GB, and 10¹² operations a second that its makers give for bfloat16 matrices without sparsity
    "rtx-3090": (24, 71),
    "rtx-4090": (24, 165),
    "rtx-5090": (32, 209),
    "a100": (80, 312),
    "h100": (80, 989),
}
SHARE = 0.5  # of a device's matrix rate that training is taken to reach; not measured on any card yet
DRIVER = 0.6e9  # bytes of a card that CUDA keeps to itself; not measured either
PLACES = 64  # of the lengths at which the fullest part is looked for
UNKNOWN_ROWS = 1000  # where neither data nor a limit says how many there are
MOMENTS = {"8bit": 2, "sgd": 0}  # bytes a trained value that optimisers of such a name keep; others: 8


@dataclass(frozen=True)
class Device:
    """What is planned for."""

    name: str
    memory: float
    rate: float  # operations a second
    dtype: torch.dtype
    reserved: float


@dataclass(frozen=True)
class Stage:
    """What a stage trains on, and how often."""

    name: str
    settings: Training
    lora: Lora
    rows: Sequence[Any]
    objective: Callable[[PreTrainedModel], Objective[Any]]
    passes: int  # over them, an adapter each
    referenced: bool = False
    assumed: str = ""  # why the rows are not the real ones


@dataclass(frozen=True)
class Found:
    """A stage's plan: bytes by part, operations, seconds."""

    stage: Stage
    cost: Cost
    tokens: int
    lengths: Sequence[int]
    part: Sequence[int]  # which rows make the fullest part of a step
    device: Device

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
        """Of all the stage trains, at the share of the device's rate that is assumed."""
        tokens = self.tokens * self.stage.settings.epochs * self.stage.passes
        each = sum(self.lengths[i] for i in self.part)
        operations = tokens * self.cost.whole / each
        operations += self.tokens * self.cost.forward / each if self.stage.referenced else 0
        return operations / (SHARE * self.device.rate)

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
) -> dict[str, Any]:
    """Plan the stages that a recipe has, or those of them that are named; how often over the rows, if not as usual."""
    base = bases.find(recipe.base, outline=True)
    device = _device(recipe, card, vram)
    found = []
    for name in names:
        stage = _stage(recipe, name, base, screen)
        if stage is not None:
            plan = _planned(recipe, base, replace(stage, passes=passes or stage.passes), device)
            found.append({**plan.facts(), "advice": "" if plan.fits else _advice(recipe, base, plan)})
    if not found:
        raise UserError(f"the recipe has no {' or '.join(names)} to plan")
    return {
        "base": base.identity["model"],
        "parameters": _shape(recipe, base, recipe.lora, device, checkpointing=False).parameters(),
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
        parts.append("\n".join(filter(None, [line, of["assumed"], of["advice"]])))
        if lengths:
            parts.append("\n".join(["tokens of a row, prompt and answers:", *audit.bars(of["histogram"])]))
    parts.append(f"Times are at {SHARE:.0%} of the device's matrix rate, {device['rate'] / 1e12:,.3g} TFLOP/s.")
    return "\n\n".join(parts)


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


# --- what is planned for ---


def _device(recipe: Recipe, card: str, vram: float | None) -> Device:
    if card or vram:
        card = card or "rtx-4090"
        if card not in CARDS:
            raise UserError(f"--card {card!r}: one of {', '.join(CARDS)}")
        memory, rate = CARDS[card]
        dtype = torch.bfloat16 if recipe.base.dtype == "auto" else getattr(torch, recipe.base.dtype)
        return Device(card, 1e9 * (vram or memory), 1e12 * rate, dtype, DRIVER)
    dtype, where = compute_dtype(recipe.base), bases.device()
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        return Device(properties.name, properties.total_memory, _rate(where, dtype), dtype, DRIVER)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # by the libraries
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("this CPU", memory, _rate(where, dtype), dtype, held)


def _rate(where: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, measured."""
    side = 8192 if where.type == "cuda" else 1024
    one = torch.randn(side, side, device=where).to(dtype)
    seconds = math.inf
    for _ in range(5):
        began = time.perf_counter()
        value = (one @ one)[0, 0].item()  # waits until it is there
        seconds = min(seconds, time.perf_counter() - began)
    return 2 * side**3 / seconds if math.isfinite(value) else 0.0


# --- stages ---


def _stage(recipe: Recipe, name: str, base: Base, screen: Screen) -> Stage | None:
    """What a stage would train on; rows of the greatest length where the data cannot be had."""
    try:
        return _STAGES[name](recipe, base, screen)
    except UserError as fault:
        known = _ASSUMED.get(name)
        if known is None or "could not be fetched" not in str(fault):
            raise
        return replace(known(recipe, base), assumed=f"(rows of the greatest length are assumed: {fault})")


def _sft(recipe: Recipe, base: Base, screen: Screen) -> Stage | None:
    if recipe.sft is None:
        return None
    found = materials.of_conversations(recipe.sft, base, screen).train
    packs = sft.packed(found, recipe.sft, base)
    return Stage("sft", recipe.sft, recipe.sft.lora or recipe.lora, packs, _saying(base), 1)


def _dpo(recipe: Recipe, base: Base, screen: Screen) -> Stage | None:
    if not recipe.preferences:
        return None
    found = [dpo.prepare(recipe, name, base, screen).train for name in recipe.preferences]
    return Stage("dpo", recipe.dpo, recipe.lora, joined(found), _preferring(recipe, base), 2, referenced=True)


def _reward(recipe: Recipe, base: Base, screen: Screen) -> Stage | None:
    settings = recipe.reward
    if settings is None:
        return None
    found = reward.prepare(recipe, settings, base, screen)

    def objective(model: PreTrainedModel) -> judging.Judging:
        means, deviations = ({name: pair[i] for name, pair in found.heads.items()} for i in (0, 1))
        heads = Heads(model.config.get_text_config().hidden_size, means, deviations)
        return judging.Judging(Reader.unchecked(model), heads, settings.lm_weight, base.chat)

    return Stage("reward", settings, settings.lora or recipe.lora, found.train, objective, 1)


def _rsf(recipe: Recipe, base: Base, screen: Screen) -> Stage | None:
    settings = recipe.rsf
    if settings is None:
        return None
    longest = min(settings.max_length, base.max_length)
    count = (settings.prompts or settings.limit or UNKNOWN_ROWS) * settings.per_prompt
    rows = View(count, lambda _: [_text(longest)])
    why = "(rows of the greatest length are assumed, as answers are drawn on the way; the drawing is not planned)"
    return Stage(
        "rsf", settings, settings.lora or recipe.lora, rows, _saying(base), settings.iterations + 1, False, why
    )


_STAGES: dict[str, Callable[[Recipe, Base, Screen], Stage | None]] = {
    "sft": _sft,
    "dpo": _dpo,
    "reward": _reward,
    "rsf": _rsf,
}


def _assumed_sft(recipe: Recipe, base: Base) -> Stage:
    assert recipe.sft is not None
    longest = min(recipe.sft.max_length, base.max_length)
    rows = View(recipe.sft.limit or UNKNOWN_ROWS, lambda _: [_text(longest)])
    return Stage("sft", recipe.sft, recipe.sft.lora or recipe.lora, rows, _saying(base), 1)


def _assumed_dpo(recipe: Recipe, base: Base) -> Stage:
    longest = min(recipe.dpo.max_length, base.max_length)
    prompt = longest // 4
    pair = TokenPair([0] * prompt, [0] * (longest - prompt), [0] * (longest - prompt), (0.0, 0.0))
    rows = View((recipe.dpo.limit or UNKNOWN_ROWS) * len(recipe.preferences), lambda _: pair)
    return Stage("dpo", recipe.dpo, recipe.lora, rows, _preferring(recipe, base), 2, referenced=True)


_ASSUMED: dict[str, Callable[[Recipe, Base], Stage]] = {"sft": _assumed_sft, "dpo": _assumed_dpo}


def _text(length: int) -> TokenText:
    return TokenText([0] * length, [0] * length)


def _saying(base: Base) -> Callable[[PreTrainedModel], Objective[Any]]:
    return lambda model: sft.Saying(Reader.unchecked(model), base.chat)


def _preferring(recipe: Recipe, base: Base) -> Callable[[PreTrainedModel], Objective[Any]]:
    settings = recipe.dpo
    return lambda model: dpo.Preferring(Reader.unchecked(model), base.chat, settings.beta, settings.label_smoothing)


# --- what it takes ---


def _shape(recipe: Recipe, base: Base, lora: Lora, device: Device, *, checkpointing: bool) -> Shape:
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    packed = recipe.base.quantization == "nf4"
    adapter = training.fresh_adapter(lora, base)
    return Shape(config, device.dtype, packed, recipe.base.double_quant, adapter, checkpointing)


def _planned(recipe: Recipe, base: Base, stage: Stage, device: Device) -> Found:
    shape = _shape(recipe, base, stage.lora, device, checkpointing=stage.settings.gradient_checkpointing)
    lengths = _lengths(stage, stage.objective(shape.outline()))
    part = fullest(lengths, stage.settings.tokens_per_batch, stage.settings.batch_size)
    rows = [stage.rows[i] for i in part]

    def step(model: PreTrainedModel) -> torch.Tensor:
        objective = stage.objective(model)
        return objective.part(rows, objective.weights(rows)).loss

    return Found(stage, shape.cost(step), sum(lengths), lengths, part, device)


def _lengths(stage: Stage, objective: Objective[Any]) -> list[int]:
    return [objective.length(row) for row in stage.rows]


def fullest(lengths: Sequence[int], budget: int, batch: int) -> list[int]:
    """The rows of a step that make its fullest part: as many alike long ones as the budget takes."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = sorted({len(order) * place // PLACES for place in range(PLACES)})
    parts = (order[at : at + max(1, min(batch, budget // max(lengths[order[at]], 1)))] for at in starts)
    return max(parts, key=lambda part: len(part) * lengths[part[0]])


def _advice(recipe: Recipe, base: Base, plan: Found) -> str:
    """The first change that makes it fit."""
    for said, settings, lora in _changes(plan.stage):
        changed = replace(plan.stage, settings=settings, lora=lora)
        found = _planned(recipe, base, changed, plan.device)
        if found.fits:
            return f"it fits with --set {said}: {_gigabytes(found.total)} GB, about {clock(found.seconds)}"
    return "it does not fit with any of gradient_checkpointing, tokens_per_batch and lora.rank: a smaller base will"


def _changes(stage: Stage) -> Iterator[tuple[str, Training, Lora]]:
    """From what costs the least to what costs the most; each with those before it."""
    settings, lora, said = stage.settings, stage.lora, ""
    while settings.tokens_per_batch > settings.max_length:
        settings = replace(settings, tokens_per_batch=settings.tokens_per_batch // 2)
        said = f"{stage.name}.tokens_per_batch={settings.tokens_per_batch}"
        yield said, settings, lora
    if not settings.gradient_checkpointing:
        yield (
            f"{stage.name}.gradient_checkpointing=true",
            replace(stage.settings, gradient_checkpointing=True),
            lora,
        )
        settings = replace(settings, gradient_checkpointing=True)
        said += f" --set {stage.name}.gradient_checkpointing=true"
        yield said, settings, lora
    while lora.rank > 4:
        lora = replace(lora, rank=lora.rank // 2)
        yield f"{said} --set lora.rank={lora.rank}", settings, lora

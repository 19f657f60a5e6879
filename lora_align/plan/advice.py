"""What to change: so that a stage fits, or so that it takes less time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import is_flash_attn_2_available

from lora_align.console import clock
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.plan.estimate import StageEstimate, estimate_stage, size
from lora_align.plan.stages import Stage
from lora_align.plan.timing import time_step
from lora_align.recipe import Lora, Recipe, Training

SMALL_ADAM = "adamw_8bit"
CARDS = (2, 4, 8)  # among which a base is divided that fits none
LOWEST_RANK = 4  # that is advised
WORTH = 0.03  # share of a stage's time that a switch has to save


@dataclass(frozen=True)
class Tried:
    """A switch, and what a step took with it: of the time without it, and seconds of the whole stage."""

    said: str
    step: float = 0.0
    seconds: float = 0.0
    pays: bool = False
    fault: str = ""  # why it was not taken


def switches(base: Base, plan: StageEstimate) -> Iterator[Tried]:
    """Other ways to compute a step, each measured beside the best before it."""
    for said, of_base, of_stage in _ways(base, plan.stage):
        other = replace(base, recipe=replace(base.recipe, **of_base))
        stage = replace(plan.stage, settings=replace(plan.stage.settings, **of_stage))
        try:
            step = time_step(other, stage, [stage.rows[i] for i in plan.part])
        except UserError as fault:
            yield Tried(said, fault=str(fault))
            continue
        assert plan.measured is not None
        with_it = replace(plan, stage=stage).by(step)
        pays = with_it.seconds < (1 - WORTH) * plan.seconds
        yield Tried(said, step.seconds / plan.measured.seconds, with_it.seconds, pays)
        if pays:
            base, plan = other, with_it


def _ways(base: Base, stage: Stage) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """As --set says it, and what it changes of the base's and of the stage's table."""
    if not stage.trains:  # tune computes as the recipe's base does, and compiles nothing
        return
    if not stage.settings.compile:
        yield f"{stage.table}.compile=true", {}, {"compile": True}
    kernels = ["sdpa"] if base.recipe.attention == "eager" else []
    kernels += ["flash_attention_2"] if is_flash_attn_2_available() else []
    for kernel in kernels:
        if kernel != base.recipe.attention:
            yield f"base.attention={kernel}", {"attention": kernel}, {}


def fitting(recipe: Recipe, base: Base, plan: StageEstimate) -> str:
    """The first change that makes it fit; or among how many cards."""
    found, said = plan, ""
    for said, settings, lora in _changes(plan.stage):
        changed = replace(plan.stage, settings=settings, lora=lora)
        found = replace(estimate_stage(recipe, base, changed, plan.device, plan.lengths), rate=plan.rate)
        if found.fits:
            return f"it fits with{said}: {size(found.total)}, about {clock(found.seconds)}"
    if recipe.base.quantization == "nf4" and plan.device.count == 1:
        for count in CARDS:
            if replace(found, device=replace(plan.device, count=count), divided=True).fits:
                return f"it fits --cards {count} that divide the base, with --set base.fsdp=true{said}"
    return "no tokens_per_batch, gradient_checkpointing, optimizer or lora.rank makes it fit: a smaller base will"


def quicker(recipe: Recipe, base: Base, plan: StageEstimate) -> str:
    """What costs time and is not needed for it to fit."""
    if not plan.stage.settings.gradient_checkpointing:
        return ""
    kept = replace(plan.stage, settings=replace(plan.stage.settings, gradient_checkpointing=False))
    found = replace(estimate_stage(recipe, base, kept, plan.device, plan.lengths), rate=plan.rate)
    if not found.fits:
        return ""
    said = f"--set {plan.stage.table}.gradient_checkpointing=false"
    return f"quicker, and it fits, with {said}: {size(found.total)}, about {clock(found.seconds)}"


def _changes(stage: Stage) -> Iterator[tuple[str, Training, Lora]]:
    """Smaller parts, then checkpointing by itself, then both, then Adam's moments in 8 bit, then a lower rank as well;
    and how to say it."""
    settings, lora = stage.settings, stage.lora
    parts, both = "", ""
    while settings.tokens_per_batch > settings.max_length:
        settings = replace(settings, tokens_per_batch=settings.tokens_per_batch // 2)
        parts = both = f" --set {stage.table}.tokens_per_batch={settings.tokens_per_batch}"
        yield parts, settings, lora
    if not settings.gradient_checkpointing:
        checkpointing = f" --set {stage.table}.gradient_checkpointing=true"
        yield checkpointing, replace(stage.settings, gradient_checkpointing=True), lora
        settings, both = replace(settings, gradient_checkpointing=True), parts + checkpointing
        yield both, settings, lora
    if stage.trains and settings.optimizer.startswith("adamw_torch"):
        settings, both = replace(settings, optimizer=SMALL_ADAM), f"{both} --set {stage.table}.optimizer={SMALL_ADAM}"
        yield both, settings, lora
    table_of_its_own = f"{stage.table}." if getattr(settings, "lora", None) else ""
    while stage.trains and lora.rank > LOWEST_RANK:
        lora = replace(lora, rank=lora.rank // 2)
        yield f"{both} --set {table_of_its_own}lora.rank={lora.rank}", settings, lora

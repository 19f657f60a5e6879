"""Advice: which settings make a stage fit, or make it faster."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_align.console import clock
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.plan.estimate import StageEstimate, estimate_stage, size
from lora_align.plan.stages import Stage
from lora_align.plan.timing import time_step
from lora_align.recipe import Lora, Recipe, Training

SMALL_ADAM = "adamw_8bit"
CARDS = (2, 4, 8)  # numbers of cards that are tried for a sharded base
LOWEST_RANK = 4  # lowest rank that is advised
WORTH = 0.03  # share of a stage's time that a switch must save to pay


@dataclass(frozen=True)
class MeasuredSwitch:
    """A change of one setting, with its measured effect."""

    setting: str  # as written after --set
    step_ratio: float = 0.0  # time of a step, relative to the time without this switch
    seconds: float = 0.0  # time of the whole stage with the switch
    pays: bool = False
    fault: str = ""  # why the switch could not be measured

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def line(self) -> str:
        """Return a line about the switch."""
        if self.fault:
            return f"--set {self.setting}: {self.fault}"
        pays = "faster" if self.pays else "not worth it"
        took = f"a step takes {self.step_ratio:.2f} of the time"
        return f"{pays}: with --set {self.setting}, {took}; about {clock(self.seconds)} in total"


def switches(base: Base, plan: StageEstimate) -> Iterator[MeasuredSwitch]:
    """Measure each switch against the fastest settings found so far."""
    for option, of_base, of_stage in _candidate_switches(base, plan.stage):
        other = replace(base, recipe=replace(base.recipe, **of_base))
        stage = plan.stage.with_settings(**of_stage)
        try:
            step = time_step(other, stage, [stage.job.rows[i] for i in plan.part])
        except UserError as fault:
            yield MeasuredSwitch(option, fault=str(fault))
            continue
        assert plan.measured is not None
        with_it = replace(plan, stage=stage).scaled_to(step)
        pays = with_it.seconds < (1 - WORTH) * plan.seconds
        yield MeasuredSwitch(option, step.seconds / plan.measured.seconds, with_it.seconds, pays)
        if pays:
            base, plan = other, with_it


def _candidate_switches(base: Base, stage: Stage) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each switch: its text for --set, and the settings that it changes in the base's and the stage's table."""
    if not stage.trains:  # `tune` neither compiles nor trains
        return
    if not stage.settings.compile:
        yield f"{stage.table}.compile=true", {}, {"compile": True}
    if base.recipe.attention == "eager":  # flash_attention_2 was never run on a card, so it is not advised
        yield "base.attention=sdpa", {"attention": "sdpa"}, {}


def what_fits(recipe: Recipe, base: Base, plan: StageEstimate) -> str:
    """Return the first change of settings, or number of cards, that makes the stage fit."""
    tried = [("", plan)]
    for options, settings, lora in _changes(plan.stage):
        changed = plan.stage.with_settings(lora, **vars(settings))
        estimate = replace(estimate_stage(recipe, base, changed, plan.device, plan.lengths), rate=plan.rate)
        if estimate.fits:
            return f"it fits with{options}: {size(estimate.total)}, about {clock(estimate.seconds)}"
        tried.append((options, estimate))
    shardable = plan.stage.trains and plan.stage.name != "rsf" and recipe.base.quantization == "nf4"
    if shardable and plan.device.count == 1:
        for count, (options, estimate) in itertools.product(CARDS, tried):
            if replace(estimate, device=replace(plan.device, count=count), sharded=True).fits:
                return f"it fits on {count} cards that shard the base, with --set base.fsdp=true{options}"
    keys = "tokens_per_batch or gradient_checkpointing"
    if plan.stage.trains:
        keys = "tokens_per_batch, gradient_checkpointing, optimizer or lora.rank"
    return f"no value of {keys} makes it fit; use a smaller base"


def faster(recipe: Recipe, base: Base, plan: StageEstimate) -> str:
    """Return advice to disable gradient checkpointing if the stage fits without it, else an empty string."""
    if not plan.stage.settings.gradient_checkpointing:
        return ""
    without = plan.stage.with_settings(gradient_checkpointing=False)
    estimate = replace(estimate_stage(recipe, base, without, plan.device, plan.lengths), rate=plan.rate)
    if not estimate.fits:
        return ""
    options = f"--set {plan.stage.table}.gradient_checkpointing=false"
    return f"faster, and it still fits, with {options}: {size(estimate.total)}, about {clock(estimate.seconds)}"


def _changes(stage: Stage) -> Iterator[tuple[str, Training, Lora]]:
    """Yield settings that need less memory, in order of preference, with their text for --set.

    The order: smaller parts, checkpointing alone, both, then also 8-bit Adam, then also a lower rank.
    """
    settings, lora = stage.settings, stage.job.lora
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

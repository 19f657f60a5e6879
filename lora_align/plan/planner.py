"""The plan of a recipe: memory and time of each stage, whether it fits, and what to change if not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_align import distributed
from lora_align.console import Screen, clock, count, table
from lora_align.errors import UserError
from lora_align.metrics.histogram import bars, histogram
from lora_align.plan import advice, shapes
from lora_align.plan.advice import MeasuredSwitch
from lora_align.plan.device import Device, device_of
from lora_align.plan.estimate import StageEstimate, estimate_stage, shape_of, size
from lora_align.plan.stages import stage_of
from lora_align.plan.timing import sampling_rate, time_step
from lora_align.recipe import Base, Preference, Ratings, Recipe, Reward, Rsf, Sft, flat

SHARED_TABLES = ("lora", "base")  # tables that every stage uses
DEFAULTS = Recipe(Base(""), sft=Sft(data=""), reward=Reward(), rsf=Rsf(data="", directions={}))
STAGES = ("sft", "dpo", "reward", "rsf", "tune")


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage: its estimate, advice, and what was measured on this device."""

    estimate: StageEstimate
    advice: str
    switches: Sequence[MeasuredSwitch] = ()
    sampling_seconds: float | None = None  # measured time to sample the stage's answers

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        facts = {**self.estimate.as_json(), "advice": self.advice}
        if self.estimate.measured:
            facts["switches"] = [switch.as_json() for switch in self.switches]
        if self.sampling_seconds is not None:
            facts["sampling_seconds"] = self.sampling_seconds
        return facts

    def lines(self) -> Iterator[str]:
        """Yield lines about the stage."""
        plan, stage = self.estimate, self.estimate.stage
        passes = f"{stage.passes} passes over " if stage.passes > 1 else ""
        each = " per pass" if stage.passes > 1 else ""
        size_ = f"{count(len(plan.lengths), 'row')}, {count(plan.tokens, 'token')}{each}"
        fits = "fits" if plan.fits else "does not fit"
        yield f"{stage.name}: {fits}; {passes}{size_}: about {clock(round(plan.seconds))}"
        yield stage.assumed
        if stage.sampling_work:
            known = self.sampling_seconds
            time = f"about {clock(known)} more" if known is not None else "--measure estimates the time"
            answers = count(stage.sampling_work.answers, "answer")
            yield f"it also samples {answers} ({time}); the times above exclude this"
        yield self.advice
        if plan.measured:
            yield (
                f"measured: the fullest part of a step takes {plan.measured.seconds:,.2f} s, "
                f"{plan.rate / plan.device.rate:.0%} of the device's matrix rate; activations and logits take "
                f"{size(plan.measured.taken)}, planned {size(plan.counted)}"
            )
        for switch in self.switches:
            yield switch.line()


@dataclass(frozen=True)
class Plan:
    """The plan of several stages on a device."""

    base: str
    shipped: bool  # whether the plan uses a shape shipped with lora-align, because the base's files are missing
    parameters: float
    device: Device
    stages: Sequence[StagePlan]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        device = {**asdict(self.device), "dtype": str(self.device.dtype).removeprefix("torch.")}
        return {**vars(self), "device": device, "stages": [stage.as_json() for stage in self.stages]}

    def summary(self, *, lengths: bool = False) -> str:
        """Format the plan as text. With `lengths`, include a histogram of the rows' lengths."""
        device = self.device
        several = f"{device.count} × " if device.count > 1 else ""
        parts = [
            f"{self.base}: {_number(self.parameters)} parameters, on {several}{device.name} with "
            f"{device.memory / 1e9:,.0f} GB{' each' if several else ''}, in {str(device.dtype).removeprefix('torch.')}"
        ]
        if self.shipped:
            parts.append(
                "The base's files are not available. The plan uses the shape of this base that lora-align ships."
            )
        parts.append(memory_table([stage.estimate for stage in self.stages]))
        for stage in self.stages:
            parts.append("\n".join(filter(None, stage.lines())))
            if lengths:
                tokens = bars(histogram(stage.estimate.lengths))
                parts.append("\n".join(["tokens of a row, prompt and answers:", *tokens]))
        if not all(stage.estimate.measured for stage in self.stages):
            rate = f"{device.rate / 1e12:,.3g} TFLOP/s"
            parts.append(
                f"Times assume that training reaches {device.share:.0%} of the device's matrix rate of {rate}."
            )
        return "\n\n".join(parts)


def plan_stages(
    recipe: Recipe,
    names: Sequence[str],
    screen: Screen,
    *,
    card: str = "",
    vram: float | None = None,
    cards: int = 0,
    passes: int | None = None,
    measure: bool = False,
) -> Plan:
    """Plan the stages in `names` that the recipe has.

    `passes` overrides the number of passes over the rows. `cards` defaults to the number of processes. With `measure`,
    a step of each stage that fits runs on this device.
    """
    base = shapes.find(recipe.base, outline=not measure)
    device = device_of(recipe, card, vram, cards or distributed.world_size())
    stages = []
    for name in names:
        reported = name == "tune" and "dpo" in names  # `dpo` has reported the dropped rows of the same data
        stage = stage_of(recipe, name, base, Screen(quiet=True) if reported else screen)
        if stage is None:
            continue
        plan = estimate_stage(recipe, base, replace(stage, passes=passes or stage.passes), device)
        switches, sampling_seconds = list[MeasuredSwitch](), None
        if measure and plan.fits and stage.trains:
            screen.note(f"{name}: measuring a step with these settings, and with faster ones")
            plan = plan.scaled_to(time_step(base, stage, [stage.job.rows[i] for i in plan.part]))
            switches = list(advice.switches(base, plan))
            if work := stage.sampling_work:
                screen.note(f"{name}: sampling answers")
                sampling_seconds = work.answers / sampling_rate(base, work)
        if plan.fits:
            advised = advice.faster(recipe, base, plan) if stage.trains else ""  # tune uses dpo's settings and advice
        else:
            advised = advice.what_fits(recipe, base, plan)
        stages.append(StagePlan(plan, advised, switches, sampling_seconds))
    if not stages:
        raise UserError(f"nothing to plan: the recipe has no tables for {' or '.join(names)}")
    parameters = shape_of(recipe, base, recipe.lora, device).parameters()
    return Plan(base.identity["model"], shapes.is_shipped(base), parameters, device, stages)


def _number(parameters: float) -> str:
    """Format a number of parameters: 8.19 billion, 135 million."""
    if parameters < 1e9:
        return f"{parameters / 1e6:.3g} million"
    return f"{parameters / 1e9:.3g} billion"


def memory_table(stages: Sequence[StageEstimate]) -> str:
    """Format the memory of stages by use, in MB if all stages need less than 1 GB, else in GB."""
    unit = "MB" if max(stage.total - stage.device.reserved for stage in stages) < 1e9 else "GB"
    rows = [
        [stage.stage.name, *(size(round(bytes_), unit).removesuffix(f" {unit}") for bytes_ in uses)]
        for stage in stages
        for uses in [[*stage.memory.values(), stage.total]]
    ]
    return table([unit, *stages[0].memory, "total"], rows)


def resolved(recipe: Recipe, stage: str) -> str:
    """Format every value of the recipe as for --set, one per line.

    The stage's own tables come first, then other values that differ from their defaults, then the rest.
    """
    values, defaults = dict(flat(recipe.as_dict())), dict(flat(asdict(DEFAULTS)))
    del values["source"]  # the recipe's name, which --set does not change
    of_preference, of_ratings = dict(flat(asdict(Preference()))), dict(flat(asdict(Ratings(""))))
    for key in values:
        if key.startswith("preferences."):
            defaults[key] = of_preference.get(key.split(".", 2)[2])
        elif key.startswith("reward.ratings."):
            defaults[key] = of_ratings.get(key.split(".", 3)[3])
        elif ".lora." in key:
            defaults[key] = defaults[f"lora.{key.rpartition('.')[2]}"]
    own = sorted(
        (key for key in values if key.split(".")[0] in (stage, *SHARED_TABLES)),
        key=lambda key: key.split(".")[0] in SHARED_TABLES,
    )
    other = [key for key in values if key not in own]
    differing = [key for key in other if values[key] != defaults.get(key)]
    blocks = {
        f"{stage}, {' and '.join(SHARED_TABLES)} (default in brackets, if different):": [
            f"{key}={_shown(values[key])}" + _unless_default(values[key], defaults.get(key)) for key in own
        ],
        "other values that differ from their defaults:": [f"{key}={_shown(values[key])}" for key in differing],
        "the rest, at their defaults:": [f"{key}={_shown(values[key])}" for key in other if key not in differing],
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks.items() if lines)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unless_default(value: Any, default: Any) -> str:
    if default is None:
        return "" if value in (None, "", {}) else "  (unset)"
    return f"  ({_shown(default)})" if default not in (value, "", {}) else ""

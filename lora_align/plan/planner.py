"""The plan of a recipe: memory and time of each stage, whether it fits, and what to change if not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lora_align import processes
from lora_align.console import Screen, clock, count, table
from lora_align.errors import UserError
from lora_align.metrics.histogram import bars
from lora_align.plan import advice, shapes
from lora_align.plan.device import device_of
from lora_align.plan.estimate import SHARE, estimate_stage, shape_of, size
from lora_align.plan.stages import stage_of
from lora_align.plan.timing import time_sampling, time_step
from lora_align.recipe import Base, Preference, Recipe, Reward, Rsf, Sft, flat

BELOW = ("lora", "base")  # tables that every stage uses
DEFAULTS = Recipe(Base(""), sft=Sft(data=""), reward=Reward(), rsf=Rsf(data="", directions={}))
STAGES = ("sft", "dpo", "reward", "rsf", "tune")


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
) -> dict[str, Any]:
    """Plan the stages in `names` that the recipe has. Return JSON data.

    `passes` overrides the number of passes over the rows. `cards` defaults to the number of processes. With `measure`,
    a step of each stage that fits runs on this device.
    """
    base = shapes.find(recipe.base, outline=not measure)
    device = device_of(recipe, card, vram, cards or processes.world_size())
    found = []
    for name in names:
        stage = stage_of(recipe, name, base, screen)
        if stage is not None:
            plan = estimate_stage(recipe, base, replace(stage, passes=passes or stage.passes), device)
            taken: dict[str, Any] = {}
            if measure and plan.fits and stage.trains:
                screen.note(f"{name}: measuring a step, with and without switches")
                plan = plan.by(time_step(base, stage, [stage.job.rows[i] for i in plan.part]))
                taken["switches"] = [asdict(tried) for tried in advice.switches(base, plan)]
                if stage.drawing:
                    screen.note(f"{name}: sampling answers")
                    taken["drawing"] = stage.drawing.answers / time_sampling(base, stage.drawing)
            if plan.fits:
                advised = advice.faster(recipe, base, plan) if stage.trains else ""  # dpo's settings are tune's too
            else:
                advised = advice.what_fits(recipe, base, plan)
            found.append({**plan.facts(), "advice": advised, **taken})
    if not found:
        raise UserError(f"nothing to plan: the recipe has no {' or '.join(names)}")
    return {
        "base": base.identity["model"],
        "shipped": shapes.is_shipped(base),
        "parameters": shape_of(recipe, base, recipe.lora, device).parameters(),
        "device": {**asdict(device), "dtype": str(device.dtype).removeprefix("torch.")},
        "stages": found,
    }


def summary(plan: Mapping[str, Any], *, lengths: bool = False) -> str:
    """Format a plan as text. With `lengths`, include a histogram of the rows' lengths."""
    device = plan["device"]
    several = f"{device['count']} × " if device["count"] > 1 else ""
    parts = [
        f"{plan['base']}: {plan['parameters'] / 1e9:,.3g} billion parameters, on {several}{device['name']} with "
        f"{device['memory'] / 1e9:,.0f} GB, in {device['dtype']}"
    ]
    if plan["shipped"]:
        parts.append("The base's files are not available. The plan uses the shape of this base that lora-align ships.")
    names = list(plan["stages"][0]["bytes"])
    listed = [[*(of["bytes"][name] for name in names), of["total"]] for of in plan["stages"]]
    unit = "MB" if max(values[-1] for values in listed) < 1e9 else "GB"
    rows = [
        [of["stage"], *(size(value, unit).removesuffix(f" {unit}") for value in values)]
        for of, values in zip(plan["stages"], listed, strict=True)
    ]
    parts.append(table([unit, *names, "total"], rows))
    for of in plan["stages"]:
        often = f"{of['passes']} passes over " if of["passes"] > 1 else ""
        line = f"{of['stage']}: {'fits' if of['fits'] else 'does not fit'}; {often}{count(of['rows'], 'row')}, "
        line += f"{count(of['tokens'], 'token')}: about {clock(of['seconds'])}"
        parts.append(
            "\n".join(filter(None, [line, of["assumed"], *_drawing(of), of["advice"], *_measured(of, device)]))
        )
        if lengths:
            parts.append("\n".join(["tokens of a row, prompt and answers:", *bars(of["histogram"])]))
    if not all(of["measured"] for of in plan["stages"]):
        parts.append(f"Times assume {SHARE:.0%} of the device's matrix rate, {device['rate'] / 1e12:,.3g} TFLOP/s.")
    return "\n\n".join(parts)


def _drawing(of: Mapping[str, Any]) -> Iterator[str]:
    if of["answers"]:
        time = f"about {clock(of['drawing'])} more" if "drawing" in of else "--measure estimates the time"
        answers = count(of["answers"], "answer")
        yield f"it also samples {answers} ({time}) and scores them; the plan excludes both"


def _measured(of: Mapping[str, Any], device: Mapping[str, Any]) -> Iterator[str]:
    if not of["measured"]:
        return
    planned, measured = of["measured"]["planned"], of["measured"]["taken"]
    yield (
        f"measured: the fullest part of a step takes {of['measured']['seconds']:,.2f} s, "
        f"{of['rate'] / device['rate']:.0%} of the device's matrix rate; activations and logits take {size(measured)}, "
        f"planned {size(planned)}"
    )
    for tried in of["switches"]:
        if tried["fault"]:
            yield f"--set {tried['said']}: {tried['fault']}"
        else:
            pays = "faster" if tried["pays"] else "not worth it"
            yield (
                f"{pays}: --set {tried['said']} takes {tried['step']:.2f} of a step's time, about "
                f"{clock(tried['seconds'])} in total"
            )


def resolved(recipe: Recipe, stage: str) -> str:
    """Format every value of the recipe as for --set, a line each.

    The stage's own tables come first, then other values that differ from their defaults, then the rest.
    """
    values, defaults = dict(flat(recipe.as_dict())), dict(flat(asdict(DEFAULTS)))
    of_preference = dict(flat(asdict(Preference())))
    for key in values:
        if key.startswith("preferences."):
            defaults[key] = of_preference.get(key.split(".", 2)[2])
    own = sorted(
        (key for key in values if key.split(".")[0] in (stage, *BELOW)), key=lambda key: key.split(".")[0] in BELOW
    )
    other = [key for key in values if key not in own]
    differing = [key for key in other if values[key] != defaults.get(key)]
    blocks = {
        f"{stage}, {' and '.join(BELOW)} (in brackets: the default, if it differs):": [
            f"{key}={_shown(values[key])}" + _unless_default(values[key], defaults.get(key)) for key in own
        ],
        "other values that differ from their defaults:": [f"{key}={_shown(values[key])}" for key in differing],
        "the rest, at their defaults:": [f"{key}={_shown(values[key])}" for key in other if key not in differing],
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks.items() if lines)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unless_default(value: Any, default: Any) -> str:
    return f"  ({_shown(default)})" if default not in (None, value, "", {}) else ""

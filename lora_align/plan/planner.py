"""Before a run: what each stage will take in memory and time, whether it fits, and what to change where it does not."""

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

BELOW = ("lora", "base")  # tables that every stage stands on
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
    """Plan the stages that a recipe has, or those of them that are named; how often over the rows, if not as usual.

    To `measure`, a step of each is taken on this device. How many `cards`, if nobody says: one a process.
    """
    base = shapes.find(recipe.base, outline=not measure)
    device = device_of(recipe, card, vram, cards or processes.count())
    found = []
    for name in names:
        stage = stage_of(recipe, name, base, screen)
        if stage is not None:
            plan = estimate_stage(recipe, base, replace(stage, passes=passes or stage.passes), device)
            taken: dict[str, Any] = {}
            if measure and plan.fits and stage.trains:
                screen.note(f"{name}: taking a step, and others in other ways")
                plan = plan.by(time_step(base, stage, [stage.rows[i] for i in plan.part]))
                taken["switches"] = [asdict(tried) for tried in advice.switches(base, plan)]
                if stage.drawing:
                    screen.note(f"{name}: drawing answers")
                    taken["drawing"] = stage.drawing.answers / time_sampling(base, stage.drawing)
            if plan.fits:
                said = advice.quicker(recipe, base, plan) if stage.trains else ""  # dpo's settings are tune's too
            else:
                said = advice.fitting(recipe, base, plan)
            found.append({**plan.facts(), "advice": said, **taken})
    if not found:
        raise UserError(f"the recipe has no {' or '.join(names)} to plan")
    return {
        "base": base.identity["model"],
        "shipped": shapes.is_shipped(base),
        "parameters": shape_of(recipe, base, recipe.lora, device).parameters(),
        "device": {**asdict(device), "dtype": str(device.dtype).removeprefix("torch.")},
        "stages": found,
    }


def summary(plan: Mapping[str, Any], *, lengths: bool = False) -> str:
    """A table by part, then what it comes to; how long the rows are, if asked for."""
    device = plan["device"]
    several = f"{device['count']} × " if device["count"] > 1 else ""
    parts = [
        f"{plan['base']}: {plan['parameters'] / 1e9:,.3g} billion parameters, on {several}{device['name']} with "
        f"{device['memory'] / 1e9:,.0f} GB, in {device['dtype']}"
    ]
    if plan["shipped"]:
        parts.append("By the shape of this base that comes with lora-align, not by its files, which cannot be had.")
    names = list(plan["stages"][0]["bytes"])
    listed = [[*(of["bytes"][name] for name in names), of["total"]] for of in plan["stages"]]
    unit = "MB" if max(values[-1] for values in listed) < 1e9 else "GB"
    rows = [
        [of["stage"], *(size(value, unit).removesuffix(f" {unit}") for value in values)]
        for of, values in zip(plan["stages"], listed, strict=True)
    ]
    parts.append(table([unit, *names, "at most"], rows))
    for of in plan["stages"]:
        often = f"{of['passes']} times over " if of["passes"] > 1 else ""
        line = f"{of['stage']}: {'fits' if of['fits'] else 'does not fit'}; {often}{count(of['rows'], 'row')}, "
        line += f"{count(of['tokens'], 'token')}: about {clock(of['seconds'])}"
        parts.append(
            "\n".join(filter(None, [line, of["assumed"], *_drawing(of), of["advice"], *_measured(of, device)]))
        )
        if lengths:
            parts.append("\n".join(["tokens of a row, prompt and answers:", *bars(of["histogram"])]))
    if not all(of["measured"] for of in plan["stages"]):
        parts.append(f"Times are at {SHARE:.0%} of the device's matrix rate, {device['rate'] / 1e12:,.3g} TFLOP/s.")
    return "\n\n".join(parts)


def _drawing(of: Mapping[str, Any]) -> Iterator[str]:
    if of["answers"]:
        time = f"about {clock(of['drawing'])} more" if "drawing" in of else "--measure says how long"
        answers = count(of["answers"], "answer")
        yield f"before that it draws {answers} ({time}) and scores them, which the plan leaves out"


def _measured(of: Mapping[str, Any], device: Mapping[str, Any]) -> Iterator[str]:
    if not of["measured"]:
        return
    said, took = of["measured"]["planned"], of["measured"]["taken"]
    yield (
        f"a step's fullest part took {of['measured']['seconds']:,.2f} s, {of['rate'] / device['rate']:.0%} of the "
        f"device's matrix rate; activations and logits {size(took)}, planned {size(said)}"
    )
    for tried in of["switches"]:
        if tried["fault"]:
            yield f"--set {tried['said']}: {tried['fault']}"
        else:
            pays = "quicker" if tried["pays"] else "does not pay"
            yield (
                f"{pays}: --set {tried['said']}, {tried['step']:.2f} of a step's time, in all about "
                f"{clock(tried['seconds'])}"
            )


def resolved(recipe: Recipe, stage: str) -> str:
    """Every value that is in force, a line each, as --set would say it: a stage's own tables first, then what differs
    from its default, then the rest."""
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
        f"{stage}, {' and '.join(BELOW)} (in brackets: the default, where it is another):": [
            f"{key}={_shown(values[key])}" + _unless_default(values[key], defaults.get(key)) for key in own
        ],
        "what else differs from its default:": [f"{key}={_shown(values[key])}" for key in differing],
        "the rest, at its defaults:": [f"{key}={_shown(values[key])}" for key in other if key not in differing],
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks.items() if lines)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unless_default(value: Any, default: Any) -> str:
    return f"  ({_shown(default)})" if default not in (None, value, "", {}) else ""

"""Checks across a recipe's values, beyond types and bounds; each fault is one line that names its key."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from lora_align.errors import closest, nearest
from lora_align.mix_weights import NAME, NAME_RULE, RESERVED
from lora_align.rankers import Ranker, Winner
from lora_align.recipe import optimizers
from lora_align.recipe.tables import (
    Base,
    Dpo,
    Eval,
    EvalSource,
    Lora,
    Pairs,
    Preference,
    Ratings,
    Recipe,
    Reward,
    Rsf,
    Sft,
)

TABLES: Mapping[str, Any] = {
    "base": Base, "lora": Lora, "pairs": Pairs, "sft": Sft, "dpo": Dpo, "reward": Reward, "rsf": Rsf, "eval": Eval,
}  # fmt: skip
DESCRIBED = ("less", "prompts", "limit", "match_length", "judge")  # keys that only a described preference reads


def describe(fault: Mapping[str, Any]) -> str:
    """Return one of pydantic's validation errors in a recipe's terms."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {where!r}{_suggestion(fault['loc'])}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type", "mapping_type"):
        return f"{where}: must be a table, as in [{where}]"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{where}: {message}, not {fault['input']!r}"


def recipe_faults(recipe: Recipe) -> Iterator[str]:
    """Yield the faults of a recipe whose types are correct."""
    yield from _optimizer_faults(recipe)
    yield from _description_faults(recipe)
    yield from _label_and_of_faults(recipe)
    yield from _reward_faults(recipe)
    yield from _rsf_faults(recipe)


def preference_faults(tables: Any) -> Iterator[str]:
    """Yield faults of `[preferences]` that types cannot express: bad names, unknown rankers, margins of labels."""
    for name, table in tables.items() if isinstance(tables, Mapping) else ():
        if not NAME.fullmatch(str(name)):
            yield f"preferences.{name}: a name has {NAME_RULE}"
        if name in RESERVED:
            yield f"preferences.{name}: this word names a policy; choose another name"
        if not isinstance(table, Mapping):
            continue
        if not any(table.get(key) for key in ("data", "of", "more")):
            yield f"preferences.{name}.data: missing; give `data`, or describe the preference with `more`"
        rank = table.get("rank", "label")
        if isinstance(rank, str):
            try:
                kind = Ranker.parse(rank).kind
            except ValueError as fault:
                yield f"preferences.{name}.rank: {fault}"
                continue
            if table.get("labels") and kind != "label":
                yield f'preferences.{name}.labels: only rank = "label" reads them, not {rank!r}'
            if kind == "label" and table.get("margin"):
                yield f"preferences.{name}.margin: a margin needs ratings or lengths; remove it, or set another `rank`"


def _description_faults(recipe: Recipe) -> Iterator[str]:
    """Yield faults of described preferences: pairs from two places, and keys that are not read."""
    plain = Preference()
    for name, table in recipe.preferences.items():
        if table.described and table.data:
            yield f"preferences.{name}: `data` and `more` exclude each other; remove one of them"
        unread = [key for key in DESCRIBED if getattr(table, key) != getattr(plain, key)]
        if unread and not table.described and not table.of:
            yield f"preferences.{name}.{unread[0]}: only a preference with `more` reads this key; remove it"


def _label_and_of_faults(recipe: Recipe) -> Iterator[str]:
    """Yield faults of `labels` and of `of` in the preferences."""
    for name, table in recipe.preferences.items():
        if table.labels and not {Winner.first, Winner.second} <= set(table.labels.values()):
            yield f'preferences.{name}.labels: give a value for "first" and one for "second"'
        if table.of and table != Preference(of=table.of):
            yield f"preferences.{name}: a preference with `of` has no other keys; set them in {', '.join(table.of)}"
        for part in table.of:
            if part not in recipe.preferences:
                yield f"preferences.{name}.of: no preference {part!r}{nearest(part, list(recipe.preferences))}"
            elif recipe.preferences[part].of:
                parts = ", ".join(recipe.preferences[part].of)
                yield f"preferences.{name}.of: {part} combines other preferences itself; list {parts} instead"


def _optimizer_faults(recipe: Recipe) -> Iterator[str]:
    """Yield a fault for each optimizer that the installed transformers does not have."""
    tables = {"sft": recipe.sft, "dpo": recipe.dpo, "reward": recipe.reward, "rsf": recipe.rsf}
    for stage, table in tables.items():
        known = optimizers.names()
        if table is not None and known and table.optimizer not in known:
            hint = nearest(table.optimizer, known) or f" (known: {', '.join(known)})"
            yield f"{stage}.optimizer: no optimizer {table.optimizer!r}{hint}"


def _reward_faults(recipe: Recipe) -> Iterator[str]:
    """Yield faults of the `[reward]` table."""
    if recipe.reward is None:
        return
    if not recipe.reward.ratings and not recipe.reward.pairs:
        yield "reward: no training data; add [reward.ratings.NAME] or [reward.pairs]"
    for head, preference in recipe.reward.pairs.items():
        if preference not in recipe.preferences:
            yield f"reward.pairs.{head}: no preference {preference!r}{nearest(preference, list(recipe.preferences))}"
        elif recipe.preferences[preference].of:
            parts = ", ".join(recipe.preferences[preference].of)
            yield f"reward.pairs.{head}: {preference} combines several preferences; choose one of {parts}"
    for name, table in recipe.reward.ratings.items():
        if table.high <= table.low:
            yield f"reward.ratings.{name}: high ({table.high:g}) must be above low ({table.low:g})"
    for name, heads in recipe.reward.objectives.items():
        if not heads:
            yield f"reward.objectives.{name}: the list is empty; name the heads to average"


def _rsf_faults(recipe: Recipe) -> Iterator[str]:
    """Yield faults of `rsf.directions`."""
    if recipe.rsf is None:
        return
    if len(recipe.rsf.directions) < 2:
        yield "rsf.directions: give two objectives or more, each with its bounds, as in verbosity = [-0.7, 0.0]"
        return
    region = recipe.rsf.directions
    wrong = {name: bounds for name, bounds in region.items() if not -1 <= bounds[0] < bounds[1] <= 1}
    for name, (low, high) in wrong.items():
        yield f"rsf.directions.{name}: expected [low, high] from -1 to 1, low < high, not [{low:g}, {high:g}]"
    if wrong:
        return
    # squared lengths of the region's points nearest to 0 and farthest from 0
    closest = sum(0.0 if low <= 0 <= high else min(low**2, high**2) for low, high in region.values())
    farthest = sum(max(low**2, high**2) for low, high in region.values())
    if not closest < 1 < farthest:
        listed = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in region.items())
        yield f"rsf.directions: no direction of length 1 lies within {listed}; change the bounds"


def _suggestion(location: tuple[str | int, ...]) -> str:
    """Return the nearest known key of the same table as a question, or else all of its keys."""
    *table, key = map(str, location)
    known = {field.name: ".".join([*table, field.name]) for field in fields(_table(location[:-1]))}
    known.pop("source", None)  # not set by hand
    inside = {} if table else {of.name: f"{name}.{of.name}" for name, kind in TABLES.items() for of in fields(kind)}
    for names in (known, inside):
        if match := closest(key, list(names)):
            return f", did you mean {names[match]!r}?"
    return f" (known: {', '.join(known)})"


def _table(location: tuple[str | int, ...]) -> Any:
    """Return the dataclass of the table at a location."""
    match location:
        case ("preferences", _):
            return Preference
        case ("reward", "ratings", _):
            return Ratings
        case ("eval", _):
            return EvalSource
        case (_, "lora"):
            return Lora
        case (name,):
            return TABLES.get(str(name), Recipe)
        case _:
            return Recipe

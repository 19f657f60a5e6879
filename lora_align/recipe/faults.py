"""What can be wrong with a recipe, in the words of a recipe."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from lora_align.errors import nearest
from lora_align.rankers import Ranker, Winner
from lora_align.recipe import optimizers
from lora_align.recipe.tables import Asked, Base, Dpo, Eval, Lora, Preference, Ratings, Recipe, Reward, Rsf, Sft
from lora_align.weights import NAME

TABLES: Mapping[str, Any] = {
    "base": Base, "lora": Lora, "sft": Sft, "dpo": Dpo, "reward": Reward, "rsf": Rsf, "eval": Eval,
}  # fmt: skip


def described(fault: Mapping[str, Any]) -> str:
    """One validation fault in the words of a recipe."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {where!r}{_suggestion(fault['loc'])}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type", "mapping_type"):
        return f"{where}: must be a table, as in [{where}]"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{where}: {message}, not {fault['input']!r}"


def of_recipe(recipe: Recipe) -> Iterator[str]:
    """Faults of tables that are each well-formed."""
    yield from _of_optimizers(recipe)
    yield from _of_pairs(recipe)
    yield from _of_reward(recipe)
    yield from _of_rsf(recipe)


def of_preferences(tables: Any) -> Iterator[str]:
    """Faults that types cannot tell: names that cannot be folders, rankers that do not exist, margins of labels."""
    for name, table in tables.items() if isinstance(tables, Mapping) else ():
        if not NAME.fullmatch(str(name)):
            yield f"preferences.{name}: a name is 1 to 64 of a-z 0-9 _ - and starts with a letter or digit"
        if not isinstance(table, Mapping):
            continue
        if not table.get("data") and not table.get("of"):
            yield f"preferences.{name}.data: missing"
        rank = table.get("rank", "label")
        if isinstance(rank, str):
            try:
                kind = Ranker.parse(rank).kind
            except ValueError as fault:
                yield f"preferences.{name}.rank: {fault}"
                continue
            if table.get("labels") and kind != "label":
                yield f'preferences.{name}.labels: they mean something to rank = "label" alone, not to {rank!r}'
            if kind == "label" and table.get("margin"):
                yield f"preferences.{name}.margin: a label says who won, not by how much; rank by rating: or score:"


def _of_pairs(recipe: Recipe) -> Iterator[str]:
    """Preferences that consist of what they cannot."""
    for name, table in recipe.preferences.items():
        if table.labels and not {Winner.first, Winner.second} <= set(table.labels.values()):
            yield f'preferences.{name}.labels: name a value for "first" and one for "second"'
        if table.of and table != Preference(of=table.of):
            yield f"preferences.{name}: the preferences it consists of have data and ranks, it has none of its own"
        for part in table.of:
            if part not in recipe.preferences:
                yield f"preferences.{name}.of: no preference {part!r}{nearest(part, list(recipe.preferences))}"
            elif recipe.preferences[part].of:
                yield f"preferences.{name}.of: {part} consists of others itself; name those"


def _of_optimizers(recipe: Recipe) -> Iterator[str]:
    """Names that the installed transformers has no optimizer for."""
    tables = {"sft": recipe.sft, "dpo": recipe.dpo, "reward": recipe.reward, "rsf": recipe.rsf}
    for stage, table in tables.items():
        known = optimizers.names()
        if table is not None and known and table.optimizer not in known:
            meant = nearest(table.optimizer, known) or f" (known: {', '.join(known)})"
            yield f"{stage}.optimizer: no optimizer {table.optimizer!r}{meant}"


def _of_reward(recipe: Recipe) -> Iterator[str]:
    """What a [reward] table says of preferences and heads that are not there."""
    if recipe.reward is None:
        return
    if not recipe.reward.ratings and not recipe.reward.pairs:
        yield "reward: nothing to learn from; give [reward.ratings.NAME] or [reward.pairs]"
    for head, preference in recipe.reward.pairs.items():
        if preference not in recipe.preferences:
            yield f"reward.pairs.{head}: no preference {preference!r}{nearest(preference, list(recipe.preferences))}"
        elif recipe.preferences[preference].of:
            yield f"reward.pairs.{head}: {preference} consists of others; a head learns from one of them"
    for name, table in recipe.reward.ratings.items():
        if table.high <= table.low:
            yield f"reward.ratings.{name}: high ({table.high:g}) must be above low ({table.low:g})"
    for name, heads in recipe.reward.objectives.items():
        if not heads:
            yield f"reward.objectives.{name}: no heads to take the mean of"


def _of_rsf(recipe: Recipe) -> Iterator[str]:
    """Directions that are none."""
    if recipe.rsf is None:
        return
    if len(recipe.rsf.directions) < 2:
        yield "rsf.directions: two objectives or more, each with its bounds, as in verbosity = [-0.7, 0.0]"
    for name, (low, high) in recipe.rsf.directions.items():
        if not -1 <= low <= high <= 1:
            yield f"rsf.directions.{name}: bounds from -1 to 1, the lower first, not [{low:g}, {high:g}]"


def _suggestion(location: tuple[str | int, ...]) -> str:
    """The known key nearest to an unknown one, in the table it stands in."""
    known = [field.name for field in fields(_table(location[:-1]))]
    return nearest(str(location[-1]), known) or f" (known: {', '.join(known)})"


def _table(location: tuple[str | int, ...]) -> Any:
    """What the table at a place is made of."""
    match location:
        case ("preferences", _):
            return Preference
        case ("reward", "ratings", _):
            return Ratings
        case ("eval", _):
            return Asked
        case (_, "lora"):
            return Lora
        case (name,):
            return TABLES.get(str(name), Recipe)
        case _:
            return Recipe

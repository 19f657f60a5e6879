"""Recipes: TOML files that name base, data, settings and preferences, read into dataclasses."""

from lora_align.recipe.reading import DEFAULT, LOCAL, builtin, changes_from_source, find, flat, from_dict, load
from lora_align.recipe.tables import (
    Base,
    Dpo,
    Eval,
    EvalSource,
    Lora,
    Preference,
    Ratings,
    Recipe,
    Reward,
    Rsf,
    Sft,
    Training,
)

__all__ = [
    "DEFAULT",
    "LOCAL",
    "Base",
    "Dpo",
    "Eval",
    "EvalSource",
    "Lora",
    "Preference",
    "Ratings",
    "Recipe",
    "Reward",
    "Rsf",
    "Sft",
    "Training",
    "builtin",
    "changes_from_source",
    "find",
    "flat",
    "from_dict",
    "load",
]

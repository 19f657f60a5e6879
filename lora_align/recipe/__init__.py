"""One TOML file describes a project. Read it, override it, and tell every fault of it at once."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align.errors import UserError, nearest
from lora_align.recipe import faults
from lora_align.recipe.tables import (
    Asked,
    Base,
    Dpo,
    Eval,
    Lora,
    Preference,
    Ratings,
    Recipe,
    Reward,
    Rsf,
    Sft,
    Training,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "LOCAL", "Asked", "Base", "Dpo", "Eval", "Lora", "Preference", "Ratings", "Recipe", "Reward", "Rsf", "Sft",
    "Training", "builtin", "find", "flat", "from_dict", "load", "unlike_its_source",
]  # fmt: skip

TABLES = {  # whose keys --set takes
    name: {field.name for field in fields(table)}
    for name, table in {
        "base": Base,
        "lora": Lora,
        "preferences.NAME": Preference,
        "sft": Sft,
        "dpo": Dpo,
        "reward": Reward,
        "rsf": Rsf,
        "eval": Eval,
    }.items()
}
LOCAL = Path("lora-align.toml")
DEFAULT = "demo"  # the recipe of a command that is given none


def builtin() -> dict[str, Path]:
    """The recipes that travel with the package, by name."""
    packaged = Path(str(files("lora_align") / "recipes"))
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(name: str | None) -> tuple[Path, str]:
    """The recipe file meant, and one line that says why it was chosen (empty when it was named)."""
    if name is None:
        if LOCAL.exists():
            return LOCAL, f"recipe: ./{LOCAL}"
        return builtin()[DEFAULT], f"recipe: the built-in demo (no --recipe and no ./{LOCAL})"
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():  # a folder may have a recipe's name
        if path.is_file():
            return path, ""
        raise UserError(f"no recipe file {name!r}")
    if name not in builtin():
        known = list(builtin())
        raise UserError(f"no recipe {name!r}{nearest(name, known)} (built in: {', '.join(known)}; or a .toml file)")
    return builtin()[name], ""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `table.key=value` overrides."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:  # of TOML, of UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {fault}") from fault
    _with_template(table, path.parent)
    table["source"] = path.stem if path == builtin().get(path.stem) else str(path)
    return from_dict(table, str(path), overrides)


def from_dict(table: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Apply overrides to plain data and check it against the dataclasses above; one error names every fault."""
    from pydantic import ValidationError

    _with_sources(table)
    for override in overrides:
        _override(table, override)
        _with_sources(table)
    _with_template(table, Path())  # what is typed lies where one is
    found: list[str] = []
    recipe: Recipe | None = None
    try:  # by way of JSON: strict about scalars, yet arrays become tuples and tables dataclasses
        recipe = _checker().validate_json(json.dumps(table, default=str), strict=True, extra="forbid")
    except ValidationError as invalid:
        found += [faults.described(dict(fault)) for fault in invalid.errors()]
    found += faults.of_preferences(table.get("preferences"))
    if recipe is not None:
        found += faults.of_recipe(recipe)
    if found or recipe is None:
        typed = [override.partition("=")[0].strip() for override in overrides]
        raise UserError(
            "\n".join(f"{'--set' if any(key in fault for key in typed) else source}: {fault}" for fault in found)
        )
    return recipe


@cache
def _checker() -> "TypeAdapter[Recipe]":
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is set with its key, as `dpo.beta`."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def unlike_its_source(recipe: Recipe) -> str:
    """Say which values of a stored recipe differ from the file it was read from, as that is now, if any do.

    Where the file cannot be read, say which differ from the defaults.
    """
    try:
        beside, name = load(find(recipe.source)[0]), recipe.source
    except UserError:
        beside, name = Recipe(base=Base(recipe.base.model), about=recipe.about, source=recipe.source), "the defaults"
    ours, theirs = (dict(flat(json.loads(json.dumps(of.as_dict())))) for of in (recipe, beside))
    found = [f"{key}={json.dumps(of, ensure_ascii=False)}" for key, of in ours.items() if theirs.get(key) != of]
    found += [f"{key} not set" for key in theirs if key not in ours]
    return f", beside {name}: {', '.join(found)}" if found else ""


def _with_sources(table: dict[str, Any]) -> None:
    """Replace `prompts = "FILE or hub id"` in [eval] by the table it is short for."""
    asked = table.get("eval")
    if isinstance(asked, dict):
        short = {field.name: asked.get(field.name) for field in fields(Eval) if field.type is Asked}
        asked.update({name: {"data": data} for name, data in short.items() if isinstance(data, str)})


def _with_template(table: dict[str, Any], folder: Path) -> None:
    """The text of a chat template in the place of its file's name."""
    base = table.get("base")
    name = base.get("chat_template") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(name, str) or not name.endswith(".jinja"):
        return
    if not (folder / name).is_file():
        raise UserError(f"base.chat_template: no file {folder / name}")
    base["chat_template"] = (folder / name).read_text(encoding="utf-8")


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `table.key=value`; the value is TOML, or else taken as text."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r}: expected table.key=value, as in --set dpo.beta=0.05")
    if len(keys) == 1 and (full := [f"{name}.{keys[0]}" for name, of in TABLES.items() if keys[0] in of]):
        raise UserError(f"--set {override!r}: the key lacks its table; one of {', '.join(full)}")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except ValueError:  # a number of thousands of digits is text, too
        value = raw.strip()
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a table")
    table[keys[-1]] = value

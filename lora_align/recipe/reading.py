"""Read a recipe: the TOML file, the overrides of --set, and all faults in one error."""

import copy
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align.errors import UserError, nearest
from lora_align.recipe import faults
from lora_align.recipe.tables import (
    Base,
    Eval,
    EvalSource,
    Preference,
    Recipe,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

TABLES = {  # table → its keys; suggests the full key if --set names a key without its table
    name: {field.name for field in fields(table)}
    for name, table in {**faults.TABLES, "preferences.NAME": Preference}.items()
}
LOCAL = Path("lora-align.toml")
DEFAULT = "demo"  # used if no --recipe is given and there is no ./lora-align.toml
LISTED = 6  # changes of a recipe that are listed


def builtin() -> dict[str, Path]:
    """Return the files of the built-in recipes by name."""
    packaged = Path(str(files("lora_align") / "recipes"))
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def find(name: str | None) -> tuple[Path, str]:
    """Return the recipe file for a name or path, and a note that says why it was chosen ("" if it was named)."""
    if name is None:
        if LOCAL.exists():
            return LOCAL, f"recipe: ./{LOCAL}"
        return builtin()[DEFAULT], f"recipe: the built-in demo (no --recipe and no ./{LOCAL})"
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():  # a folder with the name of a built-in recipe is no recipe file
        if path.is_file():
            return path, ""
        raise UserError(f"no recipe file {name!r} (looked in {Path.cwd()})")
    if name not in builtin():
        known = list(builtin())
        raise UserError(f"no recipe {name!r}{nearest(name, known)} (built in: {', '.join(known)}; or a .toml file)")
    return builtin()[name], ""


def load(path: Path, overrides: Sequence[str] = (), keywords: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and apply `table.key=value` overrides, or keywords of the Python API."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:  # invalid TOML, invalid UTF-8, or a number with thousands of digits
        raise UserError(f"{path}: not valid TOML: {fault}") from fault
    _read_template(table, path.parent)
    table["source"] = path.stem if path == builtin().get(path.stem) else str(path)
    return from_dict(table, str(path), overrides, keywords)


def from_dict(
    data: Mapping[str, Any], source: str, overrides: Sequence[str] = (), keywords: Mapping[str, Any] | None = None
) -> Recipe:
    """Apply overrides to plain data and check it against the dataclasses; one error lists every fault.

    `source` names the data in errors. `keywords` are tables of plain data, whose values replace those of `data`.
    """
    from pydantic import ValidationError

    table = copy.deepcopy(dict(data))
    _expand_eval_sources(table)
    _merge(table, keywords or {})
    _expand_eval_sources(table)
    for override in overrides:
        _override(table, override)
        _expand_eval_sources(table)
    _read_template(table, Path())  # a path given with --set is relative to the working directory
    messages: list[str] = []
    recipe: Recipe | None = None
    try:  # via JSON, where strict mode rejects wrong scalars but still converts arrays to tuples, tables to dataclasses
        recipe = _checker().validate_json(json.dumps(table, default=str), strict=True, extra="forbid")
    except ValidationError as invalid:
        messages += [faults.describe(dict(fault)) for fault in invalid.errors()]
    messages += faults.preference_faults(table.get("preferences"))
    if recipe is not None:
        messages += faults.recipe_faults(recipe)
    if messages or recipe is None:
        origins = {override.partition("=")[0].strip(): "--set" for override in overrides}
        tables = {key.partition(".")[0] for key in origins}
        origins |= {repr(table): "--set" for table in tables - data.keys()}  # an unknown table
        for name, inner in (keywords or {}).items():
            keys = [f"{name}.{key}" for key in inner] if isinstance(inner, Mapping) else [name]
            origins |= dict.fromkeys(keys, "keyword")
        raise UserError(
            "\n".join(
                f"{next((origin for key, origin in origins.items() if key in fault), source)}: {fault}"
                for fault in messages
            )
        )
    return recipe


@cache
def _checker() -> "TypeAdapter[Recipe]":
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is set with its full key, such as `dpo.beta`."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def changes_from_source(recipe: Recipe) -> str:
    """List values of a stored recipe that differ from the current contents of its source file, LISTED at most.

    If the file cannot be read, list those that differ from the defaults. Return "" if nothing differs.
    """
    if source := _source_of(recipe):
        current, name = source, recipe.source
    else:
        current, name = Recipe(base=Base(recipe.base.model), about=recipe.about, source=recipe.source), "the defaults"
    ours, theirs = (dict(flat(json.loads(json.dumps(one.as_dict())))) for one in (recipe, current))
    changed = {key: value for key, value in ours.items() if theirs.get(key) != value}
    changes = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changed.items()]
    changes += [f"{key} not set" for key, value in theirs.items() if key not in ours and value != {}]
    if more := len(changes) - LISTED:
        changes = [*changes[:LISTED], f"and {more} more"] if more > 1 else changes
    return f", changed from {name}: {', '.join(changes)}" if changes else ""


def with_eval_of_source(recipe: Recipe) -> Recipe:
    """Return a stored recipe with the [eval] table of its source file, or unchanged if the file cannot be read."""
    source = _source_of(recipe)
    return replace(recipe, eval=source.eval) if source else recipe


def _source_of(recipe: Recipe) -> Recipe | None:
    """Return the current contents of a stored recipe's source file, or None if it cannot be read."""
    try:
        return load(find(recipe.source)[0])
    except UserError:
        return None


def _expand_eval_sources(table: dict[str, Any]) -> None:
    """Replace the short form `prompts = "FILE or hub id"` in [eval] by the full table."""
    settings = table.get("eval")
    if isinstance(settings, dict):
        sources = {field.name: settings.get(field.name) for field in fields(Eval) if field.type is EvalSource}
        settings.update({name: {"data": data} for name, data in sources.items() if isinstance(data, str)})


def _read_template(table: dict[str, Any], folder: Path) -> None:
    """Replace the file name of a chat template by the file's text."""
    base = table.get("base")
    name = base.get("chat_template") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(name, str) or not name.endswith(".jinja"):
        return
    if not (folder / name).is_file():
        raise UserError(f"base.chat_template: no file {folder / name}")
    base["chat_template"] = (folder / name).read_text(encoding="utf-8")


def _merge(table: dict[str, Any], keywords: Mapping[str, Any]) -> None:
    """Set every value of `keywords` in a table, and in the tables inside it."""
    for key, value in keywords.items():
        if isinstance(value, Mapping):
            inner = table.setdefault(key, {})
            if isinstance(inner, dict):
                _merge(inner, value)
                continue
        table[key] = value


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `table.key=value`; a value that is not TOML is text."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r}: expected table.key=value, as in --set dpo.beta=0.05")
    if len(keys) == 1 and (full := [f"{name}.{keys[0]}" for name, of in TABLES.items() if keys[0] in of]):
        raise UserError(f"--set {override!r}: the key has no table; use one of {', '.join(full)}")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except ValueError:  # not TOML, or a number with thousands of digits
        value = raw.strip()
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a table")
    table[keys[-1]] = value

"""Write the generated parts of the pages in PAGES.

A page marks each generated part by `<!-- generated: NAME -->` and `<!-- end -->`. All other text is written by hand.
"""

import ast
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from lora_align.adapters.merge_methods import METHODS
from lora_align.cli.app import GROUPS, app
from lora_align.rankers import RANKERS, Winner
from lora_align.recipe import tables

DOCS = Path(__file__).parent
PACKAGE, LAYERS = DOCS.parent / "lora_align", DOCS.parent / "tests" / "test_imports.py"
PAGES = [DOCS / f"{name}.md" for name in ("cli", "recipes", "architecture", "merging", "your-data")]
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SECTIONS = {  # heading → dataclass
    "Top level": tables.Recipe,
    "`[base]`": tables.Base,
    "`[lora]`": tables.Lora,
    "Keys of all data sources": tables.Source,
    "Keys of all training stages": tables.Training,
    "`[preferences.NAME]`": tables.Preference,
    "`[pairs]`": tables.Pairs,
    "`[sft]`": tables.Sft,
    "`[dpo]`": tables.Dpo,
    "`[reward]`": tables.Reward,
    "`[reward.ratings.NAME]`": tables.Ratings,
    "`[rsf]`": tables.Rsf,
    "`[eval]`": tables.Eval,
    "`[eval.prompts]`, `[eval.risky]`, `[eval.text]`, `[eval.facts]`": tables.EvalSource,
}
SHARED = {heading: SECTIONS[heading] for heading in ("Keys of all data sources", "Keys of all training stages")}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", tables.EvalSource: "table, or text"}
NAMES[Winner] = ", ".join(f'`"{winner}"`' for winner in Winner)
PLURAL = {"text": "texts", "table": "tables", "list of texts": "lists of texts"}


def commands() -> str:
    """Return the help of every command, under the heading of its group."""
    program: Any = typer.main.get_command(app)
    settings = {**program.context_settings, "terminal_width": 100, "max_content_width": 100}
    above = typer.Context(program, info_name="lora-align", **settings)
    sections = []
    for group, names in GROUPS.items():
        sections.append(f"## {group}")
        for name in names:
            text = program.commands[name].get_help(typer.Context(program.commands[name], parent=above, info_name=name))
            sections.append(f"### {name}\n\n```\n{text.strip()}\n```")
    return "\n\n".join(sections)


def recipe_tables() -> str:
    """Return a heading and a table of keys for each table of a recipe."""
    sections = []
    for heading, table in SECTIONS.items():
        links = [
            f"the [{title.lower()}](#{title.lower().replace(' ', '-')})"
            for title, shared in SHARED.items()
            if shared in table.__bases__
        ]
        about = " ".join((table.__doc__ or "").split())
        if links:
            about += f" It also has {' and '.join(links)}."
        own = [f for f in fields(table) if f.name in table.__annotations__ and f.name != "source"]  # not set by hand
        types, docstrings = get_type_hints(table, include_extras=True), meanings(table)
        rows = [(f"`{f.name}`", allowed(types[f.name]), default(f), docstrings[f.name]) for f in own]
        lines = _table([("key", "value", "default", "meaning"), ("---",) * 4, *rows])
        sections.append("\n".join([f"## {heading}", "", textwrap.fill(about, 118, break_on_hyphens=False), "", lines]))
    return "\n\n".join(sections)


def meanings(table: type) -> Mapping[str, str]:
    """Return the docstring below each field of a dataclass in recipe/tables.py."""
    nodes = ast.parse(Path(tables.__file__).read_text("utf-8")).body
    [body] = [node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name == table.__name__]
    documented = [(a, b) for a, b in pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return {ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split()) for field, below in documented}


def allowed(kind: Any) -> str:
    """Describe the values that a type admits, such as `number, above 0, up to 1,000`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{allowed(parts[0])}, {bounds(kind.__metadata__, whole=parts[0] is int)}"
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in parts)
    if origin is tuple:
        return f"list of {PLURAL[allowed(parts[0])]}" if parts[-1] is ... else "`[low, high]`"
    if origin is Mapping:
        values = "" if parts[1] is Any else allowed(parts[1])
        return f"table of {PLURAL.get(values, values)}" if values else "table"
    if type(None) in parts:
        return allowed(parts[0])
    if origin is UnionType:
        return ", or ".join(map(allowed, parts))
    return NAMES.get(kind, "table")


def bounds(limits: tuple[Any, ...], *, whole: bool) -> str:
    """Describe the bounds of a type; later ones are narrower."""
    narrowest = {key: value for limit in limits for key, value in asdict(limit).items()}
    if "min_length" in narrowest:
        return "not empty"
    if whole and "lt" in narrowest:
        narrowest["le"] = narrowest.pop("lt") - 1
    low = f"above {narrowest['gt']:,.10g}, " if "gt" in narrowest else f"{narrowest['ge']:,.10g} "
    high = f"below {narrowest['lt']:,.10g}" if "lt" in narrowest else f"{narrowest['le']:,.10g}"
    return f"{low}{'up ' * ('gt' in narrowest)}to {high}"


def default(field: Field[Any]) -> str:
    """Return a default as TOML."""
    made = field.default_factory() if field.default_factory is not MISSING else field.default
    if made is MISSING:
        return "required"
    return "unset" if made is None else "its defaults" if is_dataclass(made) else f"`{json.dumps(made)}`"


def tree() -> str:
    """Return every module with the first sentence of its docstring. A package has that of its `__init__.py`."""
    return "\n".join(["```", "lora_align/", *_below(PACKAGE, "  "), "```"])


def _below(folder: Path, indent: str) -> Iterator[str]:
    packages = sorted(path.parent for path in folder.glob("*/__init__.py"))
    modules = sorted(path for path in folder.glob("*.py") if folder == PACKAGE or path.name != "__init__.py")
    for path in [*modules, *packages]:
        source = path / "__init__.py" if path.is_dir() else path
        sentence = re.split(r"(?<=\.)\s", ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "")[0]
        name = f"{indent}{path.name}{'/' * path.is_dir()}"
        yield textwrap.fill(sentence, 118, initial_indent=f"{name:<28} ", subsequent_indent=" " * 29)
        yield from _below(path, f"{indent}  ") if path.is_dir() else ()


def methods() -> str:
    """Return a table of the built-in merge methods."""
    rows = [("method", "paper", "result", "works on", "rank unless `--rank` is given", "options"), ("---",) * 6]
    for name, method in METHODS.built_in.items():
        rank = "the largest rank of its parts" if method.rank is max else "the ranks added"
        options = ", ".join(f"`{key}={value}`" for key, value in method.options.items())
        paper = f"[{method.title}]({method.paper})"
        rows.append((f"`{name}`", paper, method.summary, "entries" if method.dense else "factors", rank, options))
    return _table(rows)


def rankers() -> str:
    """Return a table of what `rank` may be."""
    usages = {use: better for criterion in RANKERS.built_in.values() for use, better in criterion.usage.items()}
    return _table([("`rank`", "the better answer is"), ("---",) * 2, *((f"`{use}`", usages[use]) for use in usages)])


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def layers() -> str:
    """Return the layers of tests/test_imports.py, the highest first."""
    body = ast.parse(LAYERS.read_text("utf-8")).body
    [floors] = [
        node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    ]
    return "\n".join(["```", *(", ".join(sorted(names)) for names in reversed(ast.literal_eval(floors))), "```"])


def built(page: Path) -> str:
    """Return a page with its generated parts made anew."""
    parts = {
        "commands": commands, "tables": recipe_tables, "tree": tree, "layers": layers, "methods": methods,
        "rankers": rankers,
    }  # fmt: skip
    return MARKED.sub(lambda part: f"{part[1]}\n{parts[part[2]]()}\n\n{part[3]}", page.read_text("utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(built(page), "utf-8")

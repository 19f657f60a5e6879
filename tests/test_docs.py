"""Check the generated pages of the docs, and the files and functions that docs/architecture.md names."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lora_align.data.forms import FORMS
from lora_align.data.rows import Fact

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PARTS = {
    "cli.md": ["commands"],
    "recipes.md": ["tables"],
    "architecture.md": ["layers", "tree"],
    "merging.md": ["methods"],
    "your-data.md": ["rankers"],
}
STEP = re.compile(r"^\| `([\w/]+\.py)` \| ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)  # of a walk: file, functions


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()
PACKAGE = build.PACKAGE


@pytest.mark.parametrize("name", PARTS)
def test_page_equals_what_the_code_says_now(name: str) -> None:
    page = ROOT / "docs" / name
    assert page in build.PAGES
    assert [part for _, part, _ in build.MARKED.findall(page.read_text())] == PARTS[name]
    assert page.read_text() == build.built(page), f"docs/{name} is out of date: run `just docs`"


@pytest.mark.parametrize("table", build.SECTIONS.values(), ids=lambda table: table.__name__)
def test_every_key_of_a_recipe_has_a_meaning(table: type) -> None:
    own = {field.name for field in dataclasses.fields(table) if field.name in table.__annotations__}
    meanings = build.meanings(table)
    assert meanings.keys() == own
    assert [text for text in meanings.values() if not text.endswith(".") or len(text.split()) > 25] == []


def test_every_table_of_a_recipe_has_a_section() -> None:
    defined = {kind for kind in vars(build.tables).values() if dataclasses.is_dataclass(kind)}
    assert {kind for kind in defined if kind.__module__ == build.tables.__name__} == set(build.SECTIONS.values())


@pytest.mark.parametrize("name", FORMS.built_in)
def test_your_data_lists_the_columns_of_every_form(name: str) -> None:
    rows = [row for row in (ROOT / "docs" / "your-data.md").read_text().splitlines() if row.startswith("|")]
    columns = {f"`{column}`" for column in FORMS[name].required} if FORMS[name].shape is not Fact else {"facts"}
    assert [row for row in rows if all(column in row for column in columns)]


def test_architecture_names_files_that_exist() -> None:
    text = ARCHITECTURE.read_text().partition("## Every file")[0]
    named = set(re.findall(r"`([\w/]+\.(?:py|toml))`", text))
    assert len(named) > 25
    assert {name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()} == set()


def test_architecture_names_functions_that_their_files_define() -> None:
    steps = STEP.findall(ARCHITECTURE.read_text())
    assert len(steps) > 30
    for file, names in steps:
        nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(re.findall(r"\w+", names)) <= defined, file


def test_architecture_lists_every_module() -> None:
    listed, folders = set(), [PACKAGE]
    for indent, name in re.findall(r"^((?:  )+)(\w+(?:\.py|/))", ARCHITECTURE.read_text(), re.MULTILINE):
        del folders[len(indent) // 2 :]
        if name.endswith("/"):
            folders.append(folders[-1] / name)
            listed.add(folders[-1] / "__init__.py")
        else:
            listed.add(folders[-1] / name)
    assert listed == set(PACKAGE.rglob("*.py"))

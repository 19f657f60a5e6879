"""Imports point down only, and the light commands stay light."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_align
from lora_align import preference, recipe

PACKAGE = Path(lora_align.__file__).parent
FLOORS = [
    {"errors"},
    {"processes"},
    {"console", "preference"},
    {"want"},
    {"recipe", "runs"},
    {"adapters", "data"},
    {"model"},
    {"evaluate"},
    {"doctor"},
    {"stages"},
    {"plan"},
    {"chat"},
    {"contest"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
SAME_FLOOR_BUT_ABOVE = {("data", "demo"), ("recipe", "preference")}  # the world is a data source, read when asked for


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_align":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {"__version__"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    place = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place in ("__init__", "__main__"):
        return
    for other in _imports(file) - {place}:
        assert (place, other) in SAME_FLOOR_BUT_ABOVE or LEVEL[other] < LEVEL[place] or place in ("cli",), (
            f"{file.name} imports {other}"
        )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["recipes"], 0),
        (["list"], 0),
        (["dpo", "--pref", "helpful", "--set", "dpo.betta=1"], 2),
        (["merge", "--weights", "helpful"], 2),
    ],
)
def test_light_commands_import_neither_torch_nor_transformers(words: list[str], code: int, trained: Path) -> None:
    program = (
        "import sys; from lora_align.cli import main\n"
        f"sys.argv = ['lora-align', *{words!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('heavy', sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=trained, timeout=60)
    assert f"code {code}" in done.stdout, done.stderr
    assert "heavy []" in done.stdout


@pytest.mark.parametrize(
    ("chosen", "turns"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
)
def test_torch_s_threads_wait_as_the_package_or_its_user_says(chosen: dict[str, str], turns: str) -> None:
    set_before = {key: of for key, of in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run(  # libgomp says what it goes by when it is loaded
        [sys.executable, "-c", "import lora_align.cli, torch"],
        env={**set_before, "OMP_DISPLAY_ENV": "verbose", **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{turns}'" in told.stderr


def test_every_option_of_a_recipe_is_read_somewhere() -> None:
    nodes = [node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    read = {(ast.unparse(node.value).split(".")[-1], node.attr) for node in nodes if isinstance(node, ast.Attribute)}
    tables = [recipe.Base, recipe.Lora, recipe.Training, recipe.Sft, recipe.Dpo, preference.Preference]
    tables += [recipe.Ratings, recipe.Reward, recipe.Rsf, recipe.Eval, recipe.Asked]
    holders = {
        "base",
        "recipe",
        "lora",
        "settings",
        "sft",
        "dpo",
        "axis",
        "preference",
        "self",
        "stage",
        "project",
        "table",
        "source",
        "rsf",
    }
    for table in tables:
        for field in dataclasses.fields(table):
            assert any((holder, field.name) in read for holder in holders), (
                f"nothing reads {table.__name__}.{field.name}"
            )

"""Imports point down only, and the light commands stay light."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_align
from lora_align import recipe

PACKAGE = Path(lora_align.__file__).parent
FLOORS = [
    {"errors"},
    {"distributed", "line_wrapping", "plugins", "refusals", "store"},
    {"console", "mix_weights", "text_measures"},
    {"rankers"},
    {"want_direction"},
    {"recipe", "runs"},
    {"described_pairs", "run_writer"},
    {"adapters", "data", "metrics"},
    {"model"},
    {"policy"},
    {"train"},
    {"rsf"},
    {"plan"},
    {"chat", "evaluate"},
    {"commands"},
    {"export", "serve"},
    {"demo", "prefer"},
    {"vector"},
    {"project"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def _imports(file: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_align":
            parts = node.module.split(".")[1:]
            imported |= {parts[0]} if parts else {alias.name for alias in node.names}
    return imported - {"__version__"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    place = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place in ("__init__", "__main__"):
        return
    for other in _imports(file) - {place}:
        assert LEVEL[other] < LEVEL[place] or place in ("cli",), f"{file.name} imports {other}"


LIGHT = {"torch", "transformers", "datasets"}
OF_A_BASE = {"transformers", "bitsandbytes", "peft", "trl", "datasets", "matplotlib"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["recipes"], 0),
        (["list"], 0),
        (["dpo", "--pref", "helpful", "--set", "dpo.betta=1"], 2),
        (["merge", "--weights", "helpful"], 2),
        (["merge", "-w", "helpful=1", "--rank", "0"], 2),
        (["merge", "-w", "helpful=1", "--method", "average"], 2),
        (["merge", "-w", "helpful=1", "--option", "density=1"], 2),
        (["merge", "-w", "helpful=1", "--fit", "tgi"], 2),
        (["merge", "-w", "helpful=1,harmless=1", "--method", "soup"], 2),
        (["merge", "-w", "helpfull=1"], 2),
        (["inspect", "helpfull"], 2),
        (["inspect", "-w", "helpfull=1"], 2),
        (["chat", "-w", "helpfull=1", "-p", "Hi."], 2),
        (["chat", "--adapter", "nowhere", "-p", "Hi."], 2),
        (["chat", "--want", "helpfulness=1", "-p", "Hi."], 2),
        (["generate", "--prompts", "nowhere.jsonl", "--out", "a.jsonl"], 2),
        (["generate", "--prompts", "demo:pairs?rows=4", "--out", "nowhere/a.jsonl"], 2),
        (["generate", "--prompts", "demo:pairs?rows=4", "--out", "a.jsonl", "-w", "helpfull=1"], 2),
        (["score", "--data", "nowhere.jsonl", "--out", "a.jsonl", "--by", "pair:helpful"], 2),
        (["score", "--data", "demo:pairs?rows=4", "--out", "a.jsonl", "--by", "nobody"], 2),
        (["eval", "helpfull=1"], 2),
        (["eval", "helpful=1", "--by", "pair:helpfull"], 2),
        (["sweep"], 2),
        (["sweep", "helpful=2:1"], 2),
        (["sweep", "helpfull=0:1"], 2),
        (["sweep", "helpful=0:1", "--also", "helpfull=1"], 2),
        (["tune", "--aim", "helpfull=1"], 2),
        (["reach", "helpfull"], 2),
        (["plan", "--card", "rtx"], 2),
        (["dpo", "--pref", "brief", "--name", "a/b"], 2),
        (["dpo", "--pref", "brief", "--set", "preferences.brief.data=nowhere.jsonl"], 2),
        (["data", "--pref", "brief", "--set", "preferences.brief.data=nowhere.jsonl"], 2),
        (["dpo", "--pref", "helpful"], 2),
        (["dpo", "--pref", "brief", "--set", "dpo.optimizer=galore_adamw"], 2),
        (["data", "--pref", "brief", "--set", "dpo.optimizer=galore_adamw"], 2),
        (["sft", "--recipe", "qwen3-8b"], 2),
        (["reward", "--name", "A"], 2),
        (["rsf"], 2),
        (["rsf", "--endpoint", "foo"], 2),
        (["sweep", "--directions", "9"], 2),
        (["sweep", "helpful=0:100:0.0001"], 2),
        (["eval", "helpful=1", "--judge", "foo"], 2),
        (["generate", "--endpoint", "foo", "--prompts", "demo:prompts", "--out", "a.jsonl"], 2),
        (["generate", "--show-server"], 0),
        (
            [
                "generate",
                "--endpoint",
                "http://127.0.0.1:9",
                "--model",
                "m",
                "--prompts",
                "demo:prompts?rows=1",
                "--out",
                "a.jsonl",
                "--adapter",
                "nowhere",
            ],
            2,
        ),
        (["push", "runs/none", "--to", "me/it"], 2),
        (["pairs", "--pref", "helpfull"], 2),
        (["prefer", "--prefs", "helpful"], 2),
        (["prefer", "--json"], 2),
        (["sweep", "helpful=0:1", "harmless=0:1", "--against", "prompt:a"], 2),
        (["merge", "-w", "helpful=1", "--out", "no/such/dir"], 2),
        (["merge", "-w", "helpful=1", "--method", "exact", "--option", "density=3"], 2),
        (["chat", "--seed", "99999999999999999999999"], 2),
        (["help", "dpo"], 0),
    ],
)
def test_light_commands_import_neither_torch_nor_transformers(words: list[str], code: int, trained: Path) -> None:
    assert _imported(words, code, trained) & LIGHT == set()


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "--weights", "helpful=1,harmless=0.5"],
        ["merge", "--weights", "helpful=1,harmless=0.5", "--method", "tsv", "--rank", "4", "--name", "cut"],
        ["inspect", "helpful", "harmless", "--weights", "helpful=1,harmless=-1"],
        ["score", "--help"],
    ],
)
def test_commands_that_need_no_base_import_torch_alone(words: list[str], workspace: Path) -> None:
    assert _imported(words, 0, workspace) & OF_A_BASE == set()


@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["sft", "--set", 'sft.data="demo:conversations?rows=20"'],
        ["dpo", "--pref", "helpful", "--force"],
        ["dpo", "--all", "--dry-run"],
        ["reward"],
        ["plan"],
        ["data", "--pref", "helpful"],
        ["chat", "--prompt", "hi", "--weights", "helpful=1"],
        ["eval", "helpful=1", "start"],
        ["sweep", "helpful=-1:1:1"],
        ["tune", "--aim", "helpful=1"],
        ["reach", "helpful"],
        ["score", "--data", "demo:ratings?rows=2", "--out", "scored.jsonl", "--by", "pair:helpful"],
        ["generate", "--prompts", "demo:prompts", "--out", "drawn.jsonl", "--weights", "helpful=1"],
        ["merge", "--weights", "helpful=1"],
        ["inspect", "helpful"],
        ["doctor"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_says_what_it_loads_before_it_imports_torch(words: list[str], workspace: Path) -> None:
    program = (
        "import sys\n"
        "class Torch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit(77)\n"
        "sys.meta_path.insert(0, Torch())\n"
        "from lora_align.cli import main\n"
        f"sys.argv = ['lora-align', *{words!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=workspace, timeout=60)
    assert done.returncode == 77, done.stderr
    assert re.search(r"(loading libraries.*|merging adapters|reading adapters) …\n\Z", done.stderr)


def _imported(words: list[str], code: int, folder: Path) -> set[str]:
    """Run a command in a process of its own; return the modules it has imported."""
    program = (
        "import json, sys; from lora_align.cli import main\n"
        f"sys.argv = ['lora-align', *{words!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=60)
    ended, modules = json.loads(done.stdout.splitlines()[-1])
    assert ended == code, done.stderr
    return set(modules)


@pytest.mark.parametrize(
    ("chosen", "turns"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
)
def test_torch_s_threads_wait_as_the_package_or_its_user_says(chosen: dict[str, str], turns: str) -> None:
    set_before = {key: of for key, of in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(  # libgomp says what it goes by when it is loaded
        [sys.executable, "-c", "import lora_align.cli, torch"],
        env={**set_before, "OMP_DISPLAY_ENV": "verbose", **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


def test_every_option_of_a_recipe_is_read_somewhere() -> None:
    nodes = [node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    read = {(ast.unparse(node.value).split(".")[-1], node.attr) for node in nodes if isinstance(node, ast.Attribute)}
    tables = [recipe.Base, recipe.Lora, recipe.Training, recipe.Sft, recipe.Dpo, recipe.Preference]
    tables += [recipe.Pairs, recipe.Ratings, recipe.Reward, recipe.Rsf, recipe.Eval, recipe.EvalSource]
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


def test_package_imports_without_modules_that_windows_lacks() -> None:
    program = """
import builtins, importlib, pkgutil, lora_align
original = builtins.__import__
def hide(name, globals=None, *others, **more):
    if name in {"fcntl", "grp", "pwd", "readline", "resource", "termios", "tty"}:
        if str((globals or {}).get("__name__")).startswith("lora_align"):
            raise ImportError(name)
    return original(name, globals, *others, **more)
builtins.__import__ = hide
for module in pkgutil.walk_packages(lora_align.__path__, "lora_align."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

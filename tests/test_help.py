"""Help texts: commands by group, at most 80 columns, with an example that parses."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from lora_align import recipe
from lora_align.cli.app import COMMANDS, app
from lora_align.errors import UserError
from support import COMMAND

GROUPS = {
    "Start": "demo recipes init doctor plan",
    "Data": "data pairs",
    "Train": "sft dpo reward rsf",
    "Mix": "merge inspect tune prefer reach",
    "Use": "chat generate serve score",
    "Measure": "eval sweep list",
    "Share": "export push",
}


def output(*words: str) -> str:
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True, check=True)
    return done.stdout


def test_help_lists_commands_by_group() -> None:
    text = output("-h")
    assert text == output("--help") == output("help") == output()
    sections = dict(re.findall(r"^(\w+):\n((?:  .+\n)+)", text, re.MULTILINE))
    assert {title: " ".join(re.findall(r"^  (\w+)", sections[title], re.MULTILINE)) for title in GROUPS} == GROUPS
    assert "..." not in text.partition("Start:")[2], "a first sentence does not fit into its line"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_fits_80_columns_and_its_example_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    program = typer.main.get_command(app)
    command = program.commands[name]  # type: ignore[attr-defined]
    text = command.get_help(
        typer.Context(command, parent=typer.Context(program, info_name="lora-align"), info_name=name)
    )
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search("<[a-z]+>", text.partition("Options:")[2]), "an option shows its type instead of a metavar"
    [example] = re.findall(r"^  Example: lora-align (.+)$", text, re.MULTILINE)
    called, *words = shlex.split(example)
    assert called == name
    command.make_context(name, words)


def test_help_command_prints_the_help_of_a_command() -> None:
    assert output("help", "merge") == output("merge", "-h") == output("merge", "--help")
    done = subprocess.run([COMMAND, "help", "mergee"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no command 'mergee', did you mean 'merge'?" in done.stderr


def test_shell_completes_commands_and_options(tmp_path: Path) -> None:
    for typed, completed in (("lora-align me", "merge"), ("lora-align merge --we", "--weights")):
        variables = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_LORA_ALIGN_COMPLETE": "complete_bash"}
        done = subprocess.run([COMMAND], env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True)
        assert completed in done.stdout.split(), done.stderr


def test_set_without_a_table_names_the_full_keys() -> None:
    demo = recipe.builtin()["demo"]
    full = "one of sft.learning_rate, dpo.learning_rate, reward.learning_rate, rsf.learning_rate"
    with pytest.raises(UserError, match=f"--set 'learning_rate=1': the key has no table; use {full}"):
        recipe.load(demo, ["learning_rate=1"])
    with pytest.raises(UserError, match=r"one of lora\.rank, preferences\.NAME\.rank$"):
        recipe.load(demo, ["rank=8"])

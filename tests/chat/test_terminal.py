"""Commands of a chat, on the built-in base without weights."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from lora_align import recipe
from lora_align.chat import terminal
from lora_align.chat.commands import is_script
from lora_align.chat.session import Session, open_session
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.model import base
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import START_POLICY
from support import COMMAND, Cli, Terminal, make_base

SCREEN = Screen()


@pytest.fixture(scope="module")
def loaded() -> Session:
    project = recipe.load(recipe.builtin()["demo"])
    sampling = Sampling(temperature=1.0, max_new_tokens=12, seed=5)
    return open_session(base.find(project.base), Path("none"), project, START_POLICY, sampling, Screen(quiet=True))


@pytest.fixture
def session(loaded: Session) -> Session:
    loaded.turns, loaded.system, loaded.retries = [], "", 0
    return loaded


def test_undo_without_a_question_is_an_error(session: Session) -> None:
    with pytest.raises(UserError, match="/undo: there is no question to remove"):
        terminal.run_script(session, ["/undo"], SCREEN)
    terminal.run_script(session, ["Tell me about rain.", "/undo"], SCREEN)
    assert session.turns == []


def test_retry_with_a_seed_gives_another_answer_each_time(session: Session) -> None:
    def answers() -> list[str]:
        texts = []
        for line in ("Tell me about rain.", "/retry", "/retry"):
            terminal.run_script(session, [line], SCREEN)
            texts.append(session.turns[-1].content)
            assert len(session.turns) == 2
        session.turns = []
        return texts

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first, "a new question uses the seed itself"


def test_save_writes_markdown_or_json_by_the_file_name(session: Session, tmp_path: Path) -> None:
    for name in ("talk.md", "talk.json"):
        session.turns = []
        terminal.run_script(session, ["/system Be \x1b[31mbrief.", "Hello.", f"/save {tmp_path / name}"], SCREEN)
    saved = [message["content"] for message in json.loads((tmp_path / "talk.json").read_text())["messages"]]
    markdown = (tmp_path / "talk.md").read_text()
    assert markdown.startswith(
        "# demo · start policy, no weights\n\n**system**\n\nBe \\x1b[31mbrief.\n\n**user**\n\nHello.\n"
    )
    assert markdown.endswith(f"**assistant**\n\n{saved[-1].strip()}\n")


def test_script_ends_at_the_first_error(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no command /frob"):
        terminal.run_script(session, ["/frob", "Hello."], SCREEN)
    terminal.run_script(session, ["/quit", "Hello."], SCREEN)
    assert session.turns == []


def test_piped_commands_run_line_by_line(cli: Cli) -> None:
    words = ["chat", "--runs", "none", "--max-new-tokens", "8"]
    done = cli(*words, stdin="/system Be brief.\nHello.\n/save talk.json\n")
    assert done.code == 0, done.err
    assert "system message set" in done.err
    assert "saved 3 messages to talk.json" in done.err
    refused = cli(*words, stdin="/w unheard=1\nHello.\n")
    assert refused.code == 1
    assert "error: line 1 of the input: no preference or run 'unheard'" in refused.err
    assert refused.out == ""


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("/w helpful=1\nHello.", True),
        ("Hello.\n/w helpful=1\nHi.", True),
        ("Hello.\n/exit", True),
        ("/help", True),
        ("/etc is a folder.", False),
        ("/etc/hosts: what is it?", False),
        ("What is\n/etc/hosts?", False),
        ("Either/or.", False),
    ],
)
def test_commands_are_recognised_in_piped_text(text: str, commands: bool) -> None:
    assert is_script(text) is commands


def test_answer_on_a_narrow_terminal_breaks_between_words(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, "chat", "--runs", "none", "--seed", "1", columns=40)
    chat.wait_for("› ")
    lines = chat.say("Can you explain bees, and tell me about rain?").split("\r\n")
    chat.say("/save talk.json")
    answer = json.loads((tmp_path / "talk.json").read_text())["messages"][-1]["content"]
    shown = lines[lines.index(next(line for line in lines if line and answer.startswith(line.split()[0]))) : -1]
    assert max(map(len, shown)) <= 40
    assert len(shown) > 2
    assert " ".join(" ".join(shown).split()) == " ".join(answer.split())
    chat.process.kill()


def test_ctrl_c_ends_a_script(tmp_path: Path) -> None:
    endless = make_base(tmp_path / "endless", positions=8192)  # greedy decoding with random weights never stops
    words = ["--runs", "none", "--set", f"base.model={endless}", "--temperature", "0", "--max-new-tokens", "8000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([COMMAND, "chat", *words], cwd=tmp_path, **pipes)
    assert child.stdin
    assert child.stdout
    child.stdin.write(b"/system Be brief.\nHello.\n/save talk.json\n")
    child.stdin.close()
    child.stdout.read(8)  # the answer has begun
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert not (tmp_path / "talk.json").exists()

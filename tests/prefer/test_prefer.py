"""`prefer` by the installed command: simulated people, a person on a terminal, logged comparisons, profiles."""

import json
import os
from pathlib import Path

import pytest
import torch

from lora_align.errors import UserError
from lora_align.policy import profiles
from lora_align.prefer.size import kl_of, sized
from support import Cli, Terminal

SMALL = ["--prompts", "demo:prompts?rows=40", "--max-new-tokens", "30"]


def test_simulated_person_is_found(workspace: Path, cli: Cli) -> None:
    words = ["prefer", "--simulate", "helpful=0.3,harmless=-0.7", "--noise", "0", "--picks", "10", "--json", *SMALL]
    done = cli(*words)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["picks"] == len(result["regret"]) == 10
    assert result["weights"]["harmless"]["mean"] < 0 < result["weights"]["helpful"]["mean"]
    for of in result["weights"].values():
        assert of["low"] <= of["mean"] <= of["high"]
    assert cli(*words).out == done.out  # seeded
    assert not (workspace / "runs/profiles").exists()


def test_person_on_a_terminal_makes_a_profile(workspace: Path, cli: Cli) -> None:
    terminal = Terminal(workspace, "prefer", "--picks", "3", "--profile", "mine", *SMALL)
    terminal.wait_for("›", 0)
    for typed in ("x", "1", "s", "0"):
        terminal.say(typed)
    os.write(terminal.screen, b"2\n")
    text = terminal.rest()
    assert "after 3 picks" in text
    assert terminal.text.count("1 or 2: the better answer") == 2  # at the beginning, and after the x
    assert "lora-align chat --profile mine" in text
    stored = json.loads((workspace / "runs/profiles/mine.json").read_text())
    assert stored["picks"] == 3
    used = cli("chat", "--profile", "mine", "--prompt", "Tell me about rain.", "--max-new-tokens", "10")
    assert used.code == 0, used.err


def test_logged_comparisons_teach_weights(workspace: Path, cli: Cli) -> None:
    done = cli("prefer", "--from", "demo:pairs?rows=12", "--json", *SMALL)
    assert done.code == 2
    assert "2 label columns; use rows with chosen and rejected" in done.err
    rows = [
        {"prompt": f"Tell me about rain {i}.", "chosen": "I can not say.", "rejected": "Rain is water that falls."}
        for i in range(8)
    ]
    (workspace / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("prefer", "--from", "log.jsonl", "--json", *SMALL)
    assert done.code == 0, done.err
    assert json.loads(done.out)["picks"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefs", "helpful"], "prefer: two preferences or more are needed"),
        (["--simulate", "brief=1"], "brief is not trained"),
        (["--prefs", "helpful,harmless", "--simulate", "helpful=1", "--from", "a.jsonl"], "exclude each other"),
        (["--profile", "../x"], "--profile '../x': expected 1 to 64 characters"),
        (["--json"], "--json cannot ask a person"),
    ],
)
def test_prefer_refuses(workspace: Path, cli: Cli, words: list[str], message: str) -> None:
    done = cli("prefer", *words)
    assert done.code == 2
    assert message in done.err


def test_profile_may_be_written_by_hand(tmp_path: Path) -> None:
    profiles.save("me", tmp_path, {"weights": {"helpful": {"mean": 0.5, "low": 0.1, "high": 0.9}, "brief": -0.25}})
    assert profiles.weights("me", tmp_path) == {"helpful": 0.5, "brief": -0.25}
    profiles.save("me", tmp_path, {"weights": {"helpful": 1}})
    assert "-0.25" in profiles.path("me", tmp_path).with_suffix(".old").read_text()
    profiles.path("me", tmp_path).write_text('{"weights": {"helpful": "much"}}')
    with pytest.raises(UserError, match=r"me.json: .*; expected \{\"weights\": \{\"helpful\": 0.5\}\}"):
        profiles.weights("me", tmp_path)
    with pytest.raises(UserError, match=r"no profile 'mee', did you mean 'me'\? \(known: me\)"):
        profiles.weights("mee", tmp_path)


def test_size_uses_the_whole_budget() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = {name: 0.3 * torch.randn(5000, generator=draw) for name in ("a", "b")}
    weights = sized(scores, {"a": 0.8, "b": -0.2}, 0.02)
    assert weights["a"] / weights["b"] == pytest.approx(-4)
    assert kl_of(scores, weights) == pytest.approx(0.02, rel=1e-3)
    variance = sum(weight**2 for weight in weights.values()) * 0.3**2
    assert kl_of(scores, weights) == pytest.approx(variance / 2, rel=0.1)  # small log-ratios
    assert max(sized(scores, {"a": 1.0, "b": 0.0}, 100.0).values()) == 3.0

"""`reach`: its weights against the figures of `eval`, and the warnings of weights beyond them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from pyarrow.parquet import read_table

from lora_align import recipe
from lora_align.chat import session as sessions
from lora_align.console import Screen
from lora_align.evaluate.reach import KL, Limits
from lora_align.model import base as bases
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import weighted
from support import Cli, call, edit_manifest, made_once

FEW = ["eval.count=6", "eval.samples=2", "eval.pairs=10", "eval.max_new_tokens=40"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
NAMES = ["helpful", "harmless"]
NATS = 1e-4


@pytest.fixture(scope="module")
def reached_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(trained / "runs", folder / "runs")
        done = call(folder, "reach", *NAMES, "--kl", str(NATS), "--share", "0.9", "--json", *SMALL)
        assert done.code == 0, done.err
        (folder / "stdout.json").write_text(done.out)

    return made_once(tmp_path_factory, "reach", make)


@pytest.fixture
def reached(reached_once: Path, tmp_path: Path) -> dict[str, Any]:
    """Copy the runs into a folder that a test may change."""
    shutil.copytree(reached_once / "runs", tmp_path / "runs")
    result: dict[str, Any] = json.loads((reached_once / "stdout.json").read_text())
    return result


def kl_per_token(tmp_path: Path) -> dict[str, float]:
    """Return the KL of every measured policy, in nats a token."""
    kl = {}
    for folder in (tmp_path / "runs" / "eval").iterdir():
        rows = read_table(folder / "answers.parquet").to_pylist()
        name = json.loads((folder / "measured.json").read_text())["name"]
        kl[name] = sum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)
    return kl


def test_reach_ends_one_step_before_a_limit_breaks(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    known = kl_per_token(tmp_path)
    ends = 0
    for name, of in reached["alone"].items():
        for side, sign in (("up", 1), ("down", -1)):
            good, beyond = (sign * (of[side]["to"] + more) for more in (0.0, 0.5))
            for step in range(1, round(abs(good) / 0.5) + 1):
                assert known[f"{name}={sign * step * 0.5:g}"] <= NATS, "every step below is within the limit"
            if of[side]["breaks"]:
                ends += 1
                assert of[side]["breaks"].startswith(KL)
                assert known[f"{name}={beyond:g}"] > NATS
            else:
                assert abs(good) == 4
    assert ends, "NATS must be so small that a limit breaks"
    (pair,) = reached["together"]
    assert pair["names"] == NAMES
    assert [side["signs"] for side in pair["sides"]] == [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    for side in pair["sides"]:
        at = [f"{name}={sign * (side['to'] + 0.5):g}" for name, sign in zip(NAMES, side["signs"], strict=True)]
        assert bool(side["breaks"]) == (known.get(",".join(at), 0.0) > NATS)
    assert len({side["to"] for side in pair["sides"]}) > 1


def test_slope_and_interaction_match_margins_of_eval(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    weights = [-1.0, -0.5, 0.5, 1.0]
    words = [*(f"helpful={weight:g}" for weight in weights), "harmless=1", "helpful=1,harmless=1"]
    policies = json.loads(cli("eval", *words, "--json", *SMALL).out)["policies"]
    margins = [policies[word]["margin helpful"]["value"] for word in words]
    (slope,), *_ = numpy.linalg.lstsq(numpy.array(weights)[:, None], numpy.array(margins[:4]))
    assert reached["alone"]["helpful"]["slope"] == pytest.approx(slope, abs=1e-4)
    line = numpy.array([0.0, *margins[:4]])
    off = ((line - slope * numpy.array([0.0, *weights])) ** 2).sum() / ((line - line.mean()) ** 2).sum()
    assert reached["alone"]["helpful"]["r2"] == pytest.approx(1 - off, abs=1e-3)
    assert reached["together"][0]["term"]["helpful"] == pytest.approx(margins[5] - margins[3] - margins[4], abs=1e-4)


def test_merge_chat_and_generate_warn_beyond_safe_weights(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    sides = [(name, of[way], sign) for name, of in reached["alone"].items() for way, sign in (("up", 1), ("down", -1))]
    name, side, sign = next((name, side, sign) for name, side, sign in sides if side["breaks"])
    far, last = (f"{name}={sign * (side['to'] + more):g}" for more in (1, 0))
    warning = (
        f"{far} is beyond the safe weight {0 + sign * side['to']:g} (one step further: {side['breaks']}); "
        f"choose a weight closer to 0 (measured in {reached['reach']})"
    )
    assert warning in cli("merge", "--weights", far, "--name", "far").err
    assert "beyond" not in cli("merge", "--weights", last, "--name", "last").err
    chat = cli("chat", "--weights", far, "--prompt", "Hello", "--max-new-tokens", "2")
    assert f"warning: {warning}" in chat.err
    options = ["--prompts", "demo:conversations?rows=1", "--max-new-tokens", "2", "--out", "far.jsonl"]
    assert f"warning: {warning}" in cli("generate", "--weights", far, *options).err
    soup = cli("merge", "--weights", "helpful=9", "--method", "soup", "--name", "soup")
    assert "beyond" not in soup.err, "its weights are shares"


def test_card_of_an_export_states_the_safe_weights(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1", "--gguf", "mix.gguf")
    assert done.code == 0, done.err
    up, down = (reached["alone"]["helpful"][side]["to"] for side in ("up", "down"))
    assert f"- `helpful`: weight 1; safe from {0 - down:g} to {up:g}, measured 20" in (tmp_path / "mix.md").read_text()


def test_session_warns_when_a_weight_goes_beyond_the_safe_one(reached: dict[str, Any], tmp_path: Path) -> None:
    project, quiet = recipe.load(recipe.builtin()["demo"]), Screen(quiet=True)
    runs_dir = tmp_path / "runs"
    policy = weighted({"helpful": 0.1}, project, runs_dir)
    session = sessions.open_session(bases.find(project.base), runs_dir, project, policy, Sampling(), quiet)
    assert session.set_weights({"helpful": 0.2}) == []
    assert ["harmless=9 is beyond the safe weight" in doubt for doubt in session.set_weights({"harmless": 9.0})] == [
        True
    ]
    assert session.set_weights({"harmless": 0.1}) == []
    assert ["harmless=9 is" in doubt for doubt in session.set_weights({"harmless": 9.0})] == [True]


def test_pair_is_warned_of_beyond_its_own_safe_weight(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / reached["reach"] / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in NAMES:
        manifest["metrics"]["alone"][name]["up"] = {"to": 4.0, "breaks": ""}
        manifest["metrics"]["alone"][name]["down"] = {"to": 4.0, "breaks": ""}
    for side, to in zip(manifest["metrics"]["together"][0]["sides"], (1.0, 3.0, 2.0, 4.0), strict=True):
        side |= {"to": to, "breaks": "ended 1.00 → 0.50"}
    edit_manifest(file.parent, metrics=manifest["metrics"])
    for weights, message in {
        "harmless=2,helpful=1.5": "harmless=2 with helpful=1.5 is beyond the safe weight 1 (one step further: ended",
        "helpful=3,harmless=-4": "",
        "helpful=3.5,harmless=-4": "helpful=3.5 with harmless=-4 is beyond the safe weight 3 (one step further: ended",
        "helpful=-3,harmless=2.5": "helpful=-3 with harmless=2.5 is beyond the safe weight 2 (one step further: ended",
        "harmless=-4,helpful=-4": "",
        "helpful=3,harmless=1": "",
        "helpful=3": "",
    }.items():
        err = cli("merge", "--weights", weights, "--name", "far", "--force").err
        assert message in err if message else "beyond" not in err, weights
    assert "helpful=5 is beyond the safe weight 4, the largest" in cli("merge", "--weights", "helpful=5").err


def test_retrained_vector_has_no_safe_weight(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    done = cli("dpo", "--pref", "helpful", "--direction", "pos", "--limit", "32", "--force")
    assert done.code == 0, done.err
    err = cli("merge", "--weights", "helpful=9").err
    assert "helpful=9 is far beyond 1" in err
    assert "beyond the safe weight" not in err


@pytest.mark.parametrize(
    ("figure", "before", "after", "breaks"),
    [
        ("text loss", 1.0, 1.2, True),
        ("text loss", 1.0, 0.5, False),
        ("refused safe", 0.1, 0.3, True),
        ("refused safe", 0.3, 0.0, False),
        ("oracle: true facts", 1.0, 0.8, True),
        ("facts known", 1.0, 0.8, True),
        ("ended", 1.0, 0.95, False),
        ("ended", 1.0, 0.85, True),
        ("words", 10.0, 90.0, False),
    ],
)
def test_limits_name_the_broken_figure(figure: str, before: float, after: float, breaks: bool) -> None:
    floors = ["oracle: true facts"]
    result = Limits(kl=0.1, loss=0.1, share=0.1).broken({figure: before}, {figure: after}, floors)
    assert bool(result) == breaks
    assert result in ("", f"{figure} {before:.2f} → {after:.2f}")


def test_reach_rejects_a_folder_without_vectors(cli: Cli) -> None:
    done = cli("reach")
    assert done.code == 2
    assert "`lora-align dpo --all` trains them" in done.err


def test_reach_rejects_temperature_other_than_1(workspace: Path, cli: Cli) -> None:
    cold = ["--set", "eval.temperature=0.5", *SMALL]
    done = cli("reach", "helpful", *cold)
    assert (done.code, "set eval.temperature=1" in done.err) == (2, True)
    figures = json.loads(cli("eval", "helpful=1", "--json", *cold).out)["policies"]["helpful=1"]
    assert "words" in figures
    assert "KL" not in figures

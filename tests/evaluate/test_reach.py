"""`reach`: how far a vector goes against what `eval` says there, and who is warned."""

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
from lora_align.model.decoding import Sampling
from lora_align.policy.policy import weighted
from support import Cli, call, made_once

FEW = ["eval.count=6", "eval.samples=2", "eval.pairs=10", "eval.max_new_tokens=40"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
NAMES = ["helpful", "harmless"]
NATS = 1e-4


@pytest.fixture(scope="module")
def walked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(trained / "runs", folder / "runs")
        done = call(folder, "reach", *NAMES, "--kl", str(NATS), "--share", "0.9", "--json", *SMALL)
        assert done.code == 0, done.err
        (folder / "said.json").write_text(done.out)

    return made_once(tmp_path_factory, "reach", make)


@pytest.fixture
def reached(walked: Path, tmp_path: Path) -> dict[str, Any]:
    """In a folder that a test may spoil."""
    shutil.copytree(walked / "runs", tmp_path / "runs")
    found: dict[str, Any] = json.loads((walked / "said.json").read_text())
    return found


def nats_a_token(tmp_path: Path) -> dict[str, float]:
    """Of everyone who was measured."""
    found = {}
    for folder in (tmp_path / "runs" / "eval").iterdir():
        rows = read_table(folder / "answers.parquet").to_pylist()
        name = json.loads((folder / "measured.json").read_text())["name"]
        found[name] = sum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)
    return found


def test_it_ends_where_the_next_step_breaks_something(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    known = nats_a_token(tmp_path)
    ends = 0
    for name, of in reached["alone"].items():
        for side, sign in (("up", 1), ("down", -1)):
            good, beyond = (sign * (of[side]["to"] + more) for more in (0.0, 0.5))
            for step in range(1, round(abs(good) / 0.5) + 1):
                assert known[f"{name}={sign * step * 0.5:g}"] <= NATS, "each was looked at"
            if of[side]["breaks"]:
                ends += 1
                assert of[side]["breaks"].startswith(KL)
                assert known[f"{name}={beyond:g}"] > NATS
            else:
                assert abs(good) == 4
    assert ends, "NATS is to be so small that something breaks"
    (pair,) = reached["together"]
    assert pair["names"] == NAMES
    assert [side["signs"] for side in pair["sides"]] == [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    for side in pair["sides"]:
        at = [f"{name}={sign * (side['to'] + 0.5):g}" for name, sign in zip(NAMES, side["signs"], strict=True)]
        assert bool(side["breaks"]) == (known.get(",".join(at), 0.0) > NATS)
    assert len({side["to"] for side in pair["sides"]}) > 1


def test_the_line_and_the_term_are_those_of_eval_s_margins(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    weights = [-1.0, -0.5, 0.5, 1.0]
    words = [*(f"helpful={weight:g}" for weight in weights), "harmless=1", "helpful=1,harmless=1"]
    told = json.loads(cli("eval", *words, "--json", *SMALL).out)["policies"]
    margins = [told[word]["margin helpful"]["value"] for word in words]
    (slope,), *_ = numpy.linalg.lstsq(numpy.array(weights)[:, None], numpy.array(margins[:4]))
    assert reached["alone"]["helpful"]["slope"] == pytest.approx(slope, abs=1e-4)
    line = numpy.array([0.0, *margins[:4]])
    off = ((line - slope * numpy.array([0.0, *weights])) ** 2).sum() / ((line - line.mean()) ** 2).sum()
    assert reached["alone"]["helpful"]["r2"] == pytest.approx(1 - off, abs=1e-3)
    assert reached["together"][0]["term"]["helpful"] == pytest.approx(margins[5] - margins[3] - margins[4], abs=1e-4)


def test_merge_chat_and_generate_warn_beyond_and_not_before(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    sides = [(name, of[way], sign) for name, of in reached["alone"].items() for way, sign in (("up", 1), ("down", -1))]
    name, side, sign = next((name, side, sign) for name, side, sign in sides if side["breaks"])
    far, last = (f"{name}={sign * (side['to'] + more):g}" for more in (1, 0))
    said = f"{far} is farther out than {side['to']:g}: {side['breaks']} ({reached['reach']})"
    assert said in cli("merge", "--weights", far, "--name", "far").err
    assert "farther" not in cli("merge", "--weights", last, "--name", "last").err
    chat = cli("chat", "--weights", far, "--prompt", "Hello", "--max-new-tokens", "2")
    assert f"warning: {said}" in chat.err
    asked = ["--prompts", "demo:conversations?rows=1", "--max-new-tokens", "2", "--out", "far.jsonl"]
    assert f"warning: {said}" in cli("generate", "--weights", far, *asked).err
    soup = cli("merge", "--weights", "helpful=9", "--method", "soup", "--name", "soup")
    assert "farther" not in soup.err, "its weights are shares"


def test_a_weight_that_is_turned_while_one_talks_is_warned_of(reached: dict[str, Any], tmp_path: Path) -> None:
    project, quiet = recipe.load(recipe.builtin()["demo"]), Screen(quiet=True)
    runs_dir = tmp_path / "runs"
    policy = weighted({"helpful": 0.1}, project, runs_dir)
    session = sessions.open_session(bases.find(project.base), runs_dir, project, policy, Sampling(), quiet)
    assert session.set_weights({"helpful": 0.2}) == []
    assert ["harmless=9 is farther out than" in doubt for doubt in session.set_weights({"harmless": 9.0})] == [True]
    assert session.set_weights({"harmless": 0.1}) == []
    assert ["harmless=9 is" in doubt for doubt in session.set_weights({"harmless": 9.0})] == [True]


def test_two_that_are_good_alone_may_not_be_so_together(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / reached["reach"] / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in NAMES:
        manifest["metrics"]["alone"][name]["up"] = {"to": 4.0, "breaks": ""}
        manifest["metrics"]["alone"][name]["down"] = {"to": 4.0, "breaks": ""}
    for side, to in zip(manifest["metrics"]["together"][0]["sides"], (1.0, 3.0, 2.0, 4.0), strict=True):
        side |= {"to": to, "breaks": "ended 1.00 → 0.50"}
    file.write_text(json.dumps({**manifest, "digest": ""}))
    for weights, told in {
        "harmless=2,helpful=1.5": "harmless=2 with helpful=1.5 is farther out than 1: ended",
        "helpful=3,harmless=-4": "",
        "helpful=3.5,harmless=-4": "helpful=3.5 with harmless=-4 is farther out than 3: ended",
        "helpful=-3,harmless=2.5": "helpful=-3 with harmless=2.5 is farther out than 2: ended",
        "harmless=-4,helpful=-4": "",
        "helpful=3,harmless=1": "",
        "helpful=3": "",
    }.items():
        err = cli("merge", "--weights", weights, "--name", "mix", "--force").err
        assert told in err if told else "farther" not in err, weights
    assert "helpful=5 is farther out than 4, the farthest" in cli("merge", "--weights", "helpful=5").err


def test_vectors_that_were_trained_anew_are_not_warned_of(reached: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    done = cli("dpo", "--pref", "helpful", "--direction", "pos", "--limit", "32", "--force")
    assert done.code == 0, done.err
    assert "farther" not in cli("merge", "--weights", "helpful=9").err


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
def test_what_breaks(figure: str, before: float, after: float, breaks: bool) -> None:
    found = Limits(kl=0.1, loss=0.1, share=0.1).broken({figure: before}, {figure: after})
    assert bool(found) == breaks
    assert found in ("", f"{figure} {before:.2f} → {after:.2f}")


def test_nothing_to_walk_along_is_refused(cli: Cli) -> None:
    done = cli("reach")
    assert done.code == 2
    assert "`lora-align dpo --all` trains them" in done.err


def test_answers_at_another_temperature_tell_no_divergence(workspace: Path, cli: Cli) -> None:
    cold = ["--set", "eval.temperature=0.5", *SMALL]
    done = cli("reach", "helpful", *cold)
    assert (done.code, "set eval.temperature=1" in done.err) == (2, True)
    told = json.loads(cli("eval", "helpful=1", "--json", *cold).out)["policies"]["helpful=1"]
    assert "words" in told
    assert "KL" not in told

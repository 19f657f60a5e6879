"""`sweep`: parsing axes, choosing scores, a small grid with its files and report, and continuing a stopped one."""

import csv
import json
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from pyarrow.parquet import read_table

from lora_align.errors import UserError
from lora_align.evaluate.goals import GoalScore, score_of
from lora_align.evaluate.grid import grid, weights_text
from lora_align.evaluate.measure import Measurement
from lora_align.evaluate.sweep import write_tables
from lora_align.evaluate.sweep_report import write_report
from lora_align.evaluate.sweep_result import SweepPolicy, SweepResult
from lora_align.metrics.intervals import Estimate
from lora_align.rankers import Ranker
from support import COMMAND, Cli

FEW = ["eval.count=4", "eval.samples=1", "eval.pairs=6", "eval.max_new_tokens=30"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
AXES = ["helpful=-1:1:1", "harmless=0:1:1"]


def test_grid_combines_the_values_of_all_axes() -> None:
    values, combined = grid(["helpful=-1:1", "brief=0:0.3:0.1"])
    assert values == {"helpful": [-1.0, -0.5, 0.0, 0.5, 1.0], "brief": [0.0, 0.1, 0.2, 0.3]}
    assert len(combined) == 20
    assert weights_text(combined[0]) == "helpful=-1"
    assert weights_text({"helpful": 0.0, "brief": 0.0}) == "start"


MALFORMED = ["helpful", "helpful=", "helpful=1:0", "helpful=0:1:0", "helpful=a:b", "../x=0:1"]
INFINITE = ["helpful=0:inf:1", "helpful=-inf:0", "helpful=0:1:nan"]


@pytest.mark.parametrize("axis", MALFORMED + INFINITE)
def test_grid_rejects_malformed_axis(axis: str) -> None:
    with pytest.raises(UserError, match="is not an axis"):
        grid([axis])


def test_score_of_prefers_the_judge_of_the_base() -> None:
    names = ["margin helpful", "words", "oracle: helpful", "reward: helpful", "pair:helpful"]
    for best in ["oracle: helpful", "reward: helpful", "pair:helpful", "margin helpful"]:
        assert score_of("helpful", names) == score_of("helpful@0-10", names) == GoalScore(best)
        names.remove(best)
    assert score_of("helpful", names) is None


def test_score_of_follows_the_ranker_without_a_figure_of_that_name() -> None:
    names = ["margin mine", "reward: speech", "words"]
    for rank, score in {
        "label": GoalScore("margin mine"),
        "score:speech": GoalScore("reward: speech"),
        "rating:-speech": GoalScore("reward: speech", lower=True),
        "shorter": GoalScore("words", lower=True),
        "longer": GoalScore("words"),
    }.items():
        assert score_of("mine", names, Ranker.parse(rank)) == score, rank


def test_sweep_writes_tables_plots_and_report(workspace: Path, cli: Cli) -> None:
    done = cli("sweep", *AXES, "--also", "dpo/helpful/pos", *SMALL)
    assert done.code == 0, done.err
    assert "policies that no other policy beats:" in done.out
    folder = workspace / "runs" / "sweep" / "helpful_harmless"
    assert f"{folder.relative_to(workspace)}/report.html" in done.out
    points = json.loads((folder / "points.json").read_text())
    assert [point["weights"] for point in points if point["weights"]][:2] == [
        {"helpful": 0.0, "harmless": 0.0},
        {"helpful": -1.0, "harmless": 0.0},
    ]
    assert len(points) == 3 * 2 + 1  # the start policy is on the grid
    with (folder / "points.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row, point in zip(rows, points, strict=True):
        assert row["policy"] == point["policy"]
        assert float(row["words"]) == pytest.approx(point["figures"]["words"]["value"])
    answers = read_table(folder / "answers.parquet").to_pylist()
    assert len(answers) == len(points) * 8
    assert {answer["policy"] for answer in answers} == {point["policy"] for point in points}
    for name in ("curves", "map", "front", "length", "cost"):
        assert imread(folder / f"{name}.png").std() > 0.02, name
    page = _Page()
    page.feed((folder / "report.html").read_text())
    assert len(page.pictures) == 5
    volume = json.loads((folder / "manifest.json").read_text())["metrics"]["hypervolume"]
    assert f"hypervolume {volume:.3f}, measured from the worst value of each score: oracle: helpful" in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    assert not page.external
    assert "sweep/helpful_harmless" in cli("list").out
    again = cli("sweep", *AXES, *SMALL)
    assert (again.code, "exists" in again.err) == (2, True)


def test_report_names_scores_and_hypervolume_only_if_there_are_any(tmp_path: Path) -> None:
    row = {"kind": "safe", "asked": "Why?", "answer": "So."}
    figures = {name: Estimate(0.5, 0.4, 0.6, 9) for name in ("a", "b")}
    start = SweepPolicy("start", {}, None, Measurement("start", [row], [], [], []), figures, {})
    for names in ([], ["a"], ["a", "b"]):
        result = SweepResult.of([start], {name: GoalScore(name) for name in names})
        write_report(tmp_path, "sweep x", "base", result, [start])
        page = _Page()
        page.feed((tmp_path / "report.html").read_text())
        assert (f"no other policy beats in {' and '.join(names)}." in page.text) is bool(names)
        assert ("beats" in page.text, "hypervolume" in page.text) == (bool(names), len(names) > 1)


def test_sweep_works_with_own_base_and_pairs_alone(llama: Path, cli: Cli, tmp_path: Path) -> None:
    """There are no oracle, reward model and [eval] prompts, and one axis does not contain 0."""
    rows = [{"prompt": f"q{i}?", "chosen": "Yes it is, and so on.", "rejected": "No."} for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = [f'[preferences.{name}]\ndata = "pairs.jsonl"\nrank = "{rank}"\n' for name, rank in
              (("yes", "label"), ("brief", "shorter"))]  # fmt: skip
    few = "[eval]\ncount = 4\nsamples = 2\nmax_new_tokens = 12\n"
    own = f'[base]\nmodel = "{llama}"\n[lora]\nrank = 4\n[dpo]\nheld_out = 0.2\nlearning_rate = 1e-3\n'
    (tmp_path / "lora-align.toml").write_text(own + "".join(tables) + few)
    trained = cli("dpo", "--all")
    assert trained.code == 0, trained.err
    done = cli("sweep", "yes=0:1:0.5", "brief=1:2:1")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "sweep" / "yes_brief"
    points = json.loads((folder / "points.json").read_text())
    assert len(points) == 3 * 2 + 1  # with the start policy
    assert not [name for name in points[0]["figures"] if "oracle" in name]
    assert json.loads((folder / "manifest.json").read_text())["metrics"]["scores"] == {
        "yes": "margin yes",
        "brief": "words (less is better)",
    }
    for name in ("curves", "map", "front", "cost"):
        assert imread(folder / f"{name}.png").std() > 0.02, name
    curves = imread(folder / "curves.png")[:, :, :3]
    assert curves.shape[0] > 0.8 * curves.shape[1], "a row for words, and one for margins, which have another scale"
    curve = curves[: curves.shape[0] // 2, : curves.shape[1] // 2]
    ink = abs(curve - [0x1F / 255, 0x4E / 255, 0x9C / 255]).max(-1) < 0.1
    assert ink.any(0).sum() > 0.5 * curve.shape[1], "the curve spans all weights"


class _Page(HTMLParser):
    """Collect the pictures, the text and all external resources of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.external: list[str] = []
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.pictures.append(value or "")
            elif name in ("src", "href") or tag in ("script", "link"):
                self.external.append(f"{tag} {name}={value}")


def test_killed_sweep_continues_without_measuring_again(workspace: Path, cli: Cli) -> None:
    cache = workspace / "runs" / "eval"
    words = [str(COMMAND), "sweep", *AXES, *SMALL]
    child = subprocess.Popen(words, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(cache.glob("[0-9a-f]*/measured.json"))) < 2:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    before = {file: file.stat().st_mtime_ns for file in cache.glob("[0-9a-f]*/*")}
    assert before
    assert not (workspace / "runs" / "sweep" / "helpful_harmless").exists()
    done = cli("sweep", *AXES, *SMALL)
    assert done.code == 0, done.err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(list(cache.glob("[0-9a-f]*"))) == 6


def test_csv_cells_are_never_formulas(tmp_path: Path) -> None:
    evil = ["=1+1", "+1", "-1", "@sum", "\tx", "\rx"]
    figures = {name: Estimate(1.0, 0.0, 2.0, 10) for name in evil}
    policies = [
        SweepPolicy(name, None, None, Measurement(name, [], [], [], []), figures, {}) for name in [*evil, "start"]
    ]
    write_tables(tmp_path, ["=axis"], policies)
    with (tmp_path / "points.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header[:3] == ["policy", "'=axis", "'=1+1"]
    assert [row[0] for row in rows] == [*(f"'{word}" for word in evil), "start"]

"""Plots of a sweep, read back from their axes."""

import itertools
import math
from collections.abc import Mapping

import pytest

from lora_align.evaluate import sweep_plots
from lora_align.evaluate.goals import GoalScore
from lora_align.evaluate.measure import Measurement
from lora_align.evaluate.sweep_result import SweepPolicy
from lora_align.metrics.intervals import Estimate
from lora_align.want_direction import Want

SCORES = {"talkative": GoalScore("reward: speech"), "brief": GoalScore("words", lower=True)}
GRID = {"start": (0.0, 0.0), "brief=1": (0.0, 1.0), "talkative=1": (1.0, 0.0), "brief=1,talkative=1": (1.0, 1.0)}
SPEECH = {"start": 30.0, "brief=1": 5.0, "talkative=1": 90.0, "brief=1,talkative=1": 50.0}
WORDS = {"start": 100.0, "brief=1": 20.0, "talkative=1": 110.0, "brief=1,talkative=1": 60.0}


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 1, value + 2, 10)


def policy(
    name: str, figures: Mapping[str, float], wins: Mapping[str, float] = {}, want: Want | None = None
) -> SweepPolicy:
    weights = dict(zip(SCORES, GRID[name], strict=True)) if name in GRID else None
    estimates = [{name: estimate(value) for name, value in of.items()} for of in (figures, wins)]
    return SweepPolicy(name, weights, want, Measurement(name, [], [], [], []), *estimates)


@pytest.fixture
def grid() -> list[SweepPolicy]:
    return [
        policy(name, {"reward: speech": SPEECH[name], "words": WORDS[name], "text loss": 1.5}, {"reward: speech": 0.7})
        for name in GRID
    ]


def test_front_inverts_the_axis_of_a_score_where_lower_is_better(grid: list[SweepPolicy]) -> None:
    picture = sweep_plots.front(SCORES, grid)
    assert picture
    (panel,) = picture.axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("reward: speech", "words (less is better)")
    assert not panel.xaxis_inverted()
    assert panel.yaxis_inverted()
    joined = next(line for line in panel.lines if line.get_linestyle() == "--")
    assert list(zip(*joined.get_data(), strict=True)) == [(5.0, 20.0), (50.0, 60.0), (90.0, 110.0)]
    assert sweep_plots.front({"brief": SCORES["brief"]}, grid) is None


def test_front_hides_overlapping_names(grid: list[SweepPolicy]) -> None:
    twin = SweepPolicy("twin", None, None, grid[-1].measurement, grid[-1].figures, {})
    picture = sweep_plots.front(SCORES, [*grid, twin])
    assert picture
    shown = [name for name in picture.axes[0].texts if name.get_visible()]
    assert [name.get_text() for name in shown] == ["0, 1", "1, 0", "1, 1"]
    boxes = [name.get_window_extent() for name in shown]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_curves_hold_the_other_weights_at_0(grid: list[SweepPolicy]) -> None:
    picture = sweep_plots.curves({"talkative": [0.0, 1.0], "brief": [0.0, 1.0]}, SCORES, grid)
    assert picture
    lines = [[list(line.get_ydata()) for line in panel.lines] for panel in picture.axes]
    assert lines == [[[30.0, 90.0]], [[30.0, 5.0]], [[100.0, 110.0]], [[100.0, 20.0]]]  # a row a kind of score
    assert [panel.get_xlabel() for panel in picture.axes] == 2 * ["weight of talkative", "weight of brief"]


def test_lengths_plots_wins_over_relative_words(grid: list[SweepPolicy]) -> None:
    picture = sweep_plots.lengths(SCORES, grid)
    assert picture
    (panel,) = picture.axes
    places = {float(line.get_xdata()[0]) for line in panel.lines if line.get_marker() == "o"}
    assert places == {0.2, 1.1, 0.6}
    assert panel.get_ylabel() == "wins by reward: speech"


def test_costs_plots_scores_over_costs(grid: list[SweepPolicy]) -> None:
    picture = sweep_plots.costs(SCORES, grid)
    assert picture
    speech, words = picture.axes
    assert (speech.get_ylabel(), words.get_ylabel()) == ("reward: speech", "words (less is better)")
    assert words.get_xlabel() == "text loss"
    heights = [float(bars[0].get_ydata()[0]) for bars in speech.containers]
    assert heights == list(SPEECH.values())
    assert sweep_plots.costs(SCORES, [policy("start", {"words": 1.0})]) is None


def test_asked_plots_scores_over_the_angle_of_the_direction() -> None:
    wants = [Want.of({"helpfulness": math.cos(a), "verbosity": -math.sin(a)}) for a in (0.0, math.pi / 4)]
    directions = [policy(f"want:{i}", {"words": 10.0 - i}, want=want) for i, want in enumerate(wants)]
    picture = sweep_plots.direction_curves(
        {"verbosity": GoalScore("words", lower=True)}, [policy("start", {"words": 9.0}), *directions]
    )
    assert picture
    (line,) = picture.axes[0].lines
    assert list(line.get_xdata()) == pytest.approx([0.0, -45.0])
    assert list(line.get_ydata()) == [10.0, 9.0]
    assert picture.axes[0].get_xlabel() == "degrees from helpfulness"

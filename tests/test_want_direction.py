"""Directions: normalised, sampled uniformly, written into prompts, and checked."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align import want_direction
from lora_align.errors import UserError
from lora_align.want_direction import Want, sample_direction, scores_message

KNOWN = ("helpfulness", "verbosity", "honesty")
WEIGHTS = st.dictionaries(st.sampled_from(KNOWN), st.floats(-10, 10).map(lambda w: round(w, 3)), min_size=1)


@given(WEIGHTS)
def test_of_normalises_weights_and_refuses_zeros(weights: dict[str, float]) -> None:
    if not any(weights.values()):
        with pytest.raises(UserError, match="not 0"):
            Want.of(weights)
        return
    unit = Want.of(weights).weights
    assert math.hypot(*unit.values()) == pytest.approx(1)
    size = math.hypot(*weights.values())
    assert all(unit[name] * size == pytest.approx(weights[name]) for name in weights)


def test_parse_fills_zeros_and_refuses_unknown_objectives() -> None:
    assert Want.parse("verbosity=-2", KNOWN).weights == {"helpfulness": 0, "verbosity": -1, "honesty": 0}
    with pytest.raises(UserError, match="no objective 'verbose', did you mean 'verbosity'"):
        Want.parse("verbose=1", KNOWN)
    with pytest.raises(UserError, match="expected NAME=NUMBER"):
        Want.parse("verbosity=nan", KNOWN)


def test_value_is_the_inner_product() -> None:
    assert Want({"a": 0.8, "b": -0.6}).value({"a": 50.0, "b": 10.0, "c": 99.0}) == pytest.approx(34)


@pytest.mark.parametrize(
    ("helpfulness", "verbosity", "template", "words"),
    [
        (0.8, -0.6, "rating = {{ decimals }}", "rating = helpfulness*0.8 - verbosity*0.6"),
        (-0.8, 0.6, "rating = {{ decimals }}", "rating = -helpfulness*0.8 + verbosity*0.6"),
        (1.0, -1e-17, "rating = {{ decimals }}", "rating = helpfulness*1 + verbosity*0"),
        (1.0, -0.001, "{{ integers }}.", "helpfulness*100 + verbosity*0."),
        (0.8, -0.6, "{{ integers }}.", "helpfulness*80 + verbosity*-60."),
        (0.8, -0.6, "{{ 'short ' * (-5 * want.verbosity)|round|int }}", "short short short"),
    ],
)
def test_templates_give_the_formats_of_paper_and_released_model(
    helpfulness: float, verbosity: float, template: str, words: str
) -> None:
    assert Want({"helpfulness": helpfulness, "verbosity": verbosity}).system_message(template) == words


@pytest.mark.parametrize("template", ["{{ honesty }}", "{{ want.honesty }}", "{{ decimals", "{{ want * 2 }}"])
def test_invalid_template_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"rsf\.ask: .*\(the template may use want, decimals, integers\)"):
        Want({"helpfulness": 1.0}).system_message(template)


def test_scores_template_gets_rounded_points() -> None:
    scores = {"helpfulness": 79.6, "verbosity": 25.0}
    assert scores_message(scores, "[{{ listed }}]") == "[helpfulness: 80, verbosity: 25]"
    assert scores_message(scores, "{{ scores.verbosity|int }} words") == "25 words"


def test_directions_are_sampled_uniformly() -> None:
    draw = random.Random(0)
    region = {"helpfulness": (math.cos(1.2), 1.0), "verbosity": (-1.0, 0.0)}
    angles = sorted(
        math.atan2(-w["verbosity"], w["helpfulness"])
        for w in (sample_direction(region, draw).weights for _ in range(2000))
    )
    assert 0 <= angles[0] <= angles[-1] <= 1.2
    edges = [sum(angle < 0.12 * step for angle in angles) for step in range(11)]
    counts = [after - before for before, after in pairwise(edges)]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9  # chi-square of 9 degrees, one in a thousand


def test_too_small_region_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(want_direction, "TRIES", 1000)
    with pytest.raises(UserError, match=r"the bounds a .* contain almost no unit vector"):
        sample_direction({"a": (0.6, 0.6 + 1e-9), "b": (0.0, 1.0)}, random.Random(0))

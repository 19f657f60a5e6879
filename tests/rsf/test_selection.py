"""The choice of the best and the worst candidate."""

import math
from collections import Counter

import pytest

from lora_align.data.rows import Message
from lora_align.errors import RunFailedError
from lora_align.rsf.selection import Candidate, Pool, choose, extremes, has_fallen, is_finite, mean_and_error, usable
from lora_align.want_direction import Want

PROMPT = (Message("user", "Tell me about rain."),)
BRIEF = Want.of({"helpfulness": 0.8, "verbosity": -0.6})


def candidate(text: str, helpfulness: float, verbosity: float = 0.0, *, ended: bool = True) -> Candidate:
    return Candidate(text, ended, {"helpfulness": helpfulness, "verbosity": verbosity, "harmlessness": 90.0})


def test_extremes_are_the_first_best_and_the_first_worst_for_a_direction() -> None:
    candidates = [
        candidate("long", 100, 100),
        candidate("short", 70, 10),
        candidate("also short", 70, 10),
        candidate("empty talk", 0, 90),
    ]
    assert [c.text for c in extremes(candidates, BRIEF)] == ["short", "empty talk"]
    assert [c.text for c in extremes(candidates, Want.of({"helpfulness": 1.0, "verbosity": 0.0}))] == [
        "long",
        "empty talk",
    ]
    assert [c.text for c in extremes(candidates[1:3], BRIEF)] == ["short", "short"]


def test_unusable_candidates_are_counted_by_reason() -> None:
    dropped: Counter[str] = Counter()
    candidates = [
        candidate("", 99),
        candidate(" \n", 99),
        candidate("cut", 99, ended=False),
        candidate("odd", math.nan),
        candidate("odd", math.inf),
    ]
    assert usable([*candidates, candidate("good", 5), candidate("good", 5)], dropped) == [candidate("good", 5)]
    assert dropped == {"empty answer": 2, "answer not finished": 1, "reward not finite": 2, "duplicate answer": 1}


def test_scores_that_no_direction_uses_may_be_missing() -> None:
    scores = {"helpfulness": 50.0, "verbosity": math.nan}
    assert is_finite(scores, ["helpfulness"])
    assert not is_finite(scores, ["helpfulness", "verbosity"])
    assert not is_finite(scores, ["honesty"])


def test_pools_without_usable_candidates_are_skipped_up_to_half() -> None:
    good = Pool(PROMPT, BRIEF, [candidate("a", 50, 20), candidate("b", 60, 20)])
    bad = Pool(PROMPT, BRIEF, [candidate("c", math.nan)])
    chosen = choose([good, good, bad], "harmlessness")
    assert [choice.best.text for choice in chosen.choices] == ["b", "b"]
    assert chosen.figures["dropped"]["requests without a usable answer"] == 1
    assert chosen.figures["chosen_value"] == pytest.approx(0.8 * 60 - 0.6 * 20)
    assert chosen.figures["sampled_value"] == pytest.approx(0.8 * 55 - 0.6 * 20)
    assert chosen.figures["chosen_mean"] == {"helpfulness": 60, "verbosity": 20, "harmlessness": 90}
    with pytest.raises(RunFailedError, match="no usable answer for 2 of 3 requests"):
        choose([good, bad, bad], "harmlessness")


def test_fell_requires_two_standard_errors() -> None:
    before, lower, much_lower = (mean_and_error([mean + step for step in range(-5, 6)]) for mean in (80.0, 79.0, 70.0))
    assert before["mean"] == 80
    assert before["error"] == pytest.approx(1.0)
    assert not has_fallen(before, lower)
    assert has_fallen(before, much_lower)
    assert not has_fallen(much_lower, before)

"""Which of several answers is learned from, and which are not."""

import math
from collections import Counter

import pytest

from lora_align.data.rows import Message
from lora_align.errors import RunFailedError
from lora_align.rsf.selection import Candidate, choose, extremes, fell, spread, usable
from lora_align.want import Want

ASKED = (Message("user", "Tell me about rain."),)
BRIEF = Want.of({"helpfulness": 0.8, "verbosity": -0.6})


def said(text: str, helpfulness: float, verbosity: float = 0.0, *, ended: bool = True) -> Candidate:
    return Candidate(text, ended, {"helpfulness": helpfulness, "verbosity": verbosity, "harmlessness": 90.0})


def test_the_best_and_the_worst_for_whoever_wants_it_and_of_equal_ones_the_first() -> None:
    candidates = [said("long", 100, 100), said("short", 70, 10), said("also short", 70, 10), said("empty talk", 0, 90)]
    assert [c.text for c in extremes(candidates, BRIEF)] == ["short", "empty talk"]
    assert [c.text for c in extremes(candidates, Want.of({"helpfulness": 1.0, "verbosity": 0.0}))] == [
        "long",
        "empty talk",
    ]
    assert [c.text for c in extremes(candidates[1:3], BRIEF)] == ["short", "short"]


def test_what_nobody_should_learn_from_is_counted_by_reason() -> None:
    dropped: Counter[str] = Counter()
    candidates = [
        said("", 99),
        said(" \n", 99),
        said("cut", 99, ended=False),
        said("odd", math.nan),
        said("odd", math.inf),
    ]
    assert usable([*candidates, said("good", 5), said("good", 5)], dropped) == [said("good", 5)]
    assert dropped == {"empty": 2, "cut off": 1, "reward not finite": 2, "said twice": 1}


def test_a_request_without_a_usable_answer_is_passed_over_and_too_many_end_it() -> None:
    good, bad = (ASKED, BRIEF, [said("a", 50, 20), said("b", 60, 20)]), (ASKED, BRIEF, [said("c", math.nan)])
    chosen = choose([good, good, bad], "harmlessness")
    assert [choice.best.text for choice in chosen.choices] == ["b", "b"]
    assert chosen.figures["dropped"]["requests without a usable answer"] == 1
    assert chosen.figures["kept_value"] == pytest.approx(0.8 * 60 - 0.6 * 20)
    assert chosen.figures["drawn_value"] == pytest.approx(0.8 * 55 - 0.6 * 20)
    assert chosen.figures["kept_mean"] == {"helpfulness": 60, "verbosity": 20, "harmlessness": 90}
    with pytest.raises(RunFailedError, match="2 of 3 requests have no usable answer"):
        choose([good, bad, bad], "harmlessness")


def test_a_mean_has_fallen_when_chance_does_not_explain_it() -> None:
    before, lower, much_lower = (spread([mean + step for step in range(-5, 6)]) for mean in (80.0, 79.0, 70.0))
    assert before["mean"] == 80
    assert before["error"] == pytest.approx(1.0)
    assert not fell(before, lower)
    assert fell(before, much_lower)
    assert not fell(much_lower, before)

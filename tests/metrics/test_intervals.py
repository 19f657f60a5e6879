"""Bootstrap intervals against known statistics."""

import math

import numpy
import pytest

from lora_align.metrics import intervals, repetition


def test_interval_of_a_mean_matches_the_normal_one() -> None:
    values = numpy.random.default_rng(1).normal(3.0, 2.0, 400)
    estimate = intervals.mean(values.tolist(), list(range(400)))
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert estimate.count == 400


def test_groups_are_resampled_together() -> None:
    """Eight equal answers to a prompt count like one answer."""
    of_prompt = numpy.random.default_rng(2).normal(0.0, 1.0, 50)
    once = intervals.mean(of_prompt.tolist(), list(range(50)))
    eight = intervals.mean(numpy.repeat(of_prompt, 8).tolist(), numpy.repeat(range(50), 8).tolist())
    apart = intervals.mean(numpy.repeat(of_prompt, 8).tolist(), list(range(400)))
    assert (eight.value, eight.low, eight.high) == pytest.approx((once.value, once.low, once.high))
    assert eight.high - eight.low > 2 * (apart.high - apart.low)


def test_ratio_divides_sums() -> None:
    estimate = intervals.ratio([10.0, 2.0], [5.0, 1.0], [0, 1])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def test_repetition_counts_repeated_runs_and_distinct_bigrams() -> None:
    assert repetition.repeated("the sea is blue and the sea is blue") == pytest.approx(1 / 6)
    assert repetition.repeated("short") == 0
    assert repetition.distinct(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert repetition.distinct(["", "word"]) == 1

"""The posterior of weights: it finds simulated people, its intervals are calibrated, and questions inform."""

from collections.abc import Mapping

import numpy
import pytest

from lora_align.prefer.posterior import Posterior, _log_likelihood, _log_prior

NAMES = ("helpful", "harmless", "brief", "warm")


def differences(draw: numpy.random.Generator, count: int) -> list[dict[str, float]]:
    return [dict(zip(NAMES, row.tolist(), strict=True)) for row in draw.standard_normal((count, len(NAMES)))]


def picked(
    taste: Mapping[str, float], difference: Mapping[str, float], draw: numpy.random.Generator, slip: float
) -> float:
    """Return what a person picks: the better answer, except in a share of slips."""
    better = sum(taste[name] * difference[name] for name in NAMES) > 0
    return float(better != (draw.random() < slip))


def learned(taste: Mapping[str, float], seed: int, picks: int, slip: float, *, informed: bool = True) -> Posterior:
    draw, posterior = numpy.random.default_rng(seed), Posterior(dict.fromkeys(NAMES, 1.0), seed)
    for _ in range(picks):
        choices = differences(draw, 30)
        best = choices[int(posterior.information(choices).argmax())] if informed else choices[0]
        posterior.update(best, picked(taste, best, draw, slip))
    return posterior


def cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    a, b = (numpy.array([of[name] for name in NAMES]) for of in (one, other))
    return float(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))


def test_fifteen_picks_find_the_direction_of_a_person() -> None:
    tastes = [
        dict(zip(NAMES, row.tolist(), strict=True)) for row in numpy.random.default_rng(5).standard_normal((12, 4))
    ]
    found = [cosine(taste, learned(taste, seed, 15, 0.1).direction()) for seed, taste in enumerate(tastes)]
    blind = [
        cosine(taste, learned(taste, seed, 15, 0.1, informed=False).direction()) for seed, taste in enumerate(tastes)
    ]
    assert numpy.mean(found) > 0.85
    assert numpy.mean(found) > numpy.mean(blind)


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """People are drawn from the prior itself, and pick with its noise."""
    inside, draw = [], numpy.random.default_rng(7)
    for seed in range(60):
        v, lapse = draw.laplace(0.0, 0.7, 4), min(1 - draw.random() ** (1 / 9), 0.5)
        posterior = Posterior(dict.fromkeys(NAMES, 1.0), seed)
        for difference in differences(draw, 12):
            x = numpy.array([difference[name] for name in NAMES])
            p = lapse / 2 + (1 - lapse) / (1 + numpy.exp(-v @ x))
            posterior.update(difference, float(draw.random() < p))
        truth = v / numpy.abs(v).sum()
        inside += [of.low <= true <= of.high for of, true in zip(posterior.weights().values(), truth, strict=True)]
    assert 0.84 <= numpy.mean(inside) <= 0.96  # 90 %, of 240 intervals


def test_particles_equal_a_grid_over_two_weights() -> None:
    draw, posterior = numpy.random.default_rng(1), Posterior({"a": 1.0, "b": 1.0}, 0)
    x = draw.standard_normal((12, 2))
    won = (x @ [1.0, -0.5] + draw.logistic(size=12) * 0.5 > 0).astype(float)
    for row, win in zip(x, won, strict=True):
        posterior.update({"a": row[0], "b": row[1]}, float(win))
    axis, lapses = numpy.linspace(-6, 6, 121), numpy.linspace(0.005, 0.495, 25)
    v = numpy.array([(a, b) for a in axis for b in axis for _ in lapses])
    lapse = numpy.tile(lapses, len(axis) ** 2)
    log = _log_prior(v, lapse) + _log_likelihood(v, lapse, x, won)
    shares = numpy.exp(log - log.max())
    shares /= shares.sum()
    expected = shares @ (v / numpy.maximum(numpy.abs(v).sum(1, keepdims=True), 1e-12))
    assert [of.mean for of in posterior.weights().values()] == pytest.approx(expected.tolist(), abs=0.06)


def test_scores_of_another_scale_give_the_direction_in_their_own_units() -> None:
    taste = {"helpful": 0.5, "harmless": 0.5, "brief": 0.0, "warm": 0.0}
    draw = numpy.random.default_rng(2)
    plain, wide = (Posterior({**dict.fromkeys(NAMES, 1.0), "helpful": spread}, 0) for spread in (1.0, 10.0))
    for difference in differences(draw, 20):
        won = picked(taste, difference, draw, 0.0)
        plain.update(difference, won)
        wide.update({**difference, "helpful": 10 * difference["helpful"]}, won)
    assert numpy.allclose(plain._v, wide._v)
    raw = plain._v / [10.0, 1.0, 1.0, 1.0]
    assert numpy.allclose(wide.directions(), raw / numpy.abs(raw).sum(1, keepdims=True))


def test_a_question_whose_answer_is_known_tells_little() -> None:
    posterior = learned({"helpful": 1.0, "harmless": 0.0, "brief": 0.0, "warm": 0.0}, 0, 25, 0.0)
    zeros = dict.fromkeys(NAMES, 0.0)
    known, open_, equal = posterior.information(
        [{**zeros, "helpful": 9.0}, {**zeros, "harmless": 2.0, "brief": -2.0}, zeros]
    )
    assert open_ > 2 * known
    assert equal == pytest.approx(0.0, abs=1e-9)


def test_neither_moves_the_weights_less_than_a_pick() -> None:
    difference = dict.fromkeys(NAMES, 0.0) | {"helpful": 2.0}
    means = []
    for won in (1.0, 0.5):
        posterior = Posterior(dict.fromkeys(NAMES, 1.0), 0)
        posterior.update(difference, won)
        means.append(posterior.weights()["helpful"].mean)
    assert means[0] > 0.1
    assert abs(means[1]) < 0.03

"""The posterior of a person's weights, given picks between two answers.

The probability that a person picks the first of two answers is λ/2 + (1 − λ) σ(x · v). x are the differences of the
vectors' scores, λ is the lapse rate, and v are the weights times the sharpness of the person's taste. Only this
product is known, so the posterior is reported for the direction v / Σ|v|. The prior of v is a Laplace distribution for
each vector, which makes all directions of one pattern of signs equally likely.

Particles represent the posterior. After each pick they are weighted by its likelihood; when few of them carry most of
the weight, they are sampled again and moved by Metropolis steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]
PARTICLES, SWEEPS = 4000, 12
SHARPNESS = 0.7  # scale of the prior of v: log-odds of a pick for one standard deviation of a score
LAPSES, MOST_LAPSES = 9.0, 0.5  # the prior of λ is proportional to (1 − λ)^(LAPSES − 1) up to MOST_LAPSES
ENOUGH = 0.5  # share of effective particles below which they are sampled again
INTERVAL = (5.0, 95.0)  # percentiles: a 90 % interval
KNOWN = 0.05  # Σ|mean weight| below which the mean is mostly the noise of the particles
TINY = 1e-12


@dataclass(frozen=True)
class Weight:
    """The posterior of one weight of the direction, whose absolute weights sum to 1."""

    mean: float
    low: float
    high: float


@dataclass
class Posterior:
    """Particles of v and λ. `spreads` are the standard deviations of the vectors' scores, by name."""

    spreads: Mapping[str, float]
    seed: int = 0
    differences: list[Array] = field(default_factory=list)  # of the scores of each pick, in standard deviations
    wins: list[float] = field(default_factory=list)  # 1 for the first answer, 0 for the second, 0.5 for neither

    def __post_init__(self) -> None:
        self._draw = numpy.random.default_rng(self.seed)
        self._v = self._draw.laplace(0.0, SHARPNESS, (PARTICLES, len(self.spreads)))
        lapses = 1 - self._draw.random(PARTICLES) ** (1 / LAPSES)
        self._lapse = numpy.minimum(lapses, MOST_LAPSES - TINY)
        self._shares = numpy.full(PARTICLES, 1 / PARTICLES)

    @property
    def names(self) -> list[str]:
        """Return the names of the vectors."""
        return list(self.spreads)

    def update(self, difference: Mapping[str, float], won: float) -> None:
        """Learn from a pick. `difference` has the scores of the first answer minus those of the second."""
        self.differences.append(self._standardised(difference))
        self.wins.append(won)
        logs = numpy.log(self._shares + TINY) + _log_likelihood(
            self._v, self._lapse, self.differences[-1][None], numpy.array([won])
        )
        shares = numpy.exp(logs - logs.max())
        self._shares = shares / shares.sum()
        if 1 / (self._shares**2).sum() < ENOUGH * PARTICLES:
            self._resample()

    def information(self, differences: Sequence[Mapping[str, float]]) -> Array:
        """Return the mutual information between each possible pick and the weights, in nats."""
        each = numpy.stack([self._standardised(one) for one in differences])
        p = _probability(self._v, self._lapse, each)  # [particles, picks]
        return _entropy(self._shares @ p) - self._shares @ _entropy(p)

    def weights(self) -> dict[str, Weight]:
        """Return the posterior of each weight of the direction."""
        directions = self.directions()
        mean = self._shares @ directions
        return {
            name: Weight(float(mean[place]), *self._interval(directions[:, place]))
            for place, name in enumerate(self.names)
        }

    def direction(self) -> dict[str, float]:
        """Return the direction with the mean of the weights, or zeros if the picks say nothing about it."""
        mean = self._shares @ self.directions()
        if numpy.abs(mean).sum() < KNOWN:
            mean = numpy.zeros_like(mean)
        return dict(zip(self.names, (mean / max(float(numpy.abs(mean).sum()), TINY)).tolist(), strict=True))

    def sample(self, count: int) -> list[dict[str, float]]:
        """Sample directions."""
        chosen = self.directions()[self._draw.choice(PARTICLES, count, p=self._shares)]
        return [dict(zip(self.names, row.tolist(), strict=True)) for row in chosen]

    def directions(self) -> Array:
        """Return the direction of every particle, for scores that are not standardised."""
        raw = self._v / numpy.array(list(self.spreads.values()))
        directions: Array = raw / numpy.maximum(numpy.abs(raw).sum(1, keepdims=True), TINY)
        return directions

    def _standardised(self, difference: Mapping[str, float]) -> Array:
        return numpy.array([difference[name] / spread for name, spread in self.spreads.items()])

    def _interval(self, values: Array) -> tuple[float, float]:
        """Return the interval of a value over the weighted particles."""
        order = numpy.argsort(values)
        below = numpy.cumsum(self._shares[order])
        low, high = (values[order][min(int(numpy.searchsorted(below, at / 100)), len(order) - 1)] for at in INTERVAL)
        return float(low), float(high)

    def _resample(self) -> None:
        """Sample particles by their weight, then move each by Metropolis steps that keep the posterior."""
        chosen = self._draw.choice(PARTICLES, PARTICLES, p=self._shares)
        self._v, self._lapse = self._v[chosen], self._lapse[chosen]
        self._shares = numpy.full(PARTICLES, 1 / PARTICLES)
        x, won = numpy.stack(self.differences), numpy.array(self.wins)
        size = self._v.shape[1] + 1
        spread = numpy.cov(numpy.column_stack([self._v, self._lapse]).T) + 1e-9 * numpy.eye(size)
        step = numpy.linalg.cholesky(spread) * 2.38 / size**0.5
        here = _log_prior(self._v, self._lapse) + _log_likelihood(self._v, self._lapse, x, won)
        for _ in range(SWEEPS):
            move = self._draw.standard_normal((PARTICLES, size)) @ step.T
            v, lapse = self._v + move[:, :-1], self._lapse + move[:, -1]
            there = _log_prior(v, lapse) + _log_likelihood(v, numpy.clip(lapse, 0, MOST_LAPSES), x, won)
            taken = numpy.log(self._draw.random(PARTICLES)) < there - here
            self._v[taken], self._lapse[taken], here[taken] = v[taken], lapse[taken], there[taken]


def _probability(v: Array, lapse: Array, x: Array) -> Array:
    """Return the probability that the first answer is picked: [particles, picks]."""
    logits = numpy.clip(v @ x.T, -40, 40)
    probability: Array = lapse[:, None] / 2 + (1 - lapse[:, None]) / (1 + numpy.exp(-logits))
    return probability


def _log_likelihood(v: Array, lapse: Array, x: Array, won: Array) -> Array:
    """Return the log-likelihood of all picks for each particle. Neither counts half for each answer."""
    p = numpy.clip(_probability(v, lapse, x), TINY, 1 - TINY)
    total: Array = (won * numpy.log(p) + (1 - won) * numpy.log1p(-p)).sum(1)
    return total


def _log_prior(v: Array, lapse: Array) -> Array:
    prior: Array = -numpy.abs(v).sum(1) / SHARPNESS + (LAPSES - 1) * numpy.log1p(-numpy.minimum(lapse, MOST_LAPSES))
    prior[(lapse < 0) | (lapse >= MOST_LAPSES)] = -numpy.inf
    return prior


def _entropy(p: Array) -> Array:
    """Return the entropy of a pick with probability p, in nats."""
    p = numpy.clip(p, TINY, 1 - TINY)
    entropy: Array = -p * numpy.log(p) - (1 - p) * numpy.log1p(-p)
    return entropy

"""Compare policies as curves over their scale, at equal KL from the start policy.

A curve is a policy at several scales; scale 0 is the start policy. A figure of a curve at some KL is interpolated
between two scales whose KL encloses it, and never extrapolated. All policies answer the same prompts, so prompts are
resampled jointly for the KL and the figures of both curves; pairs, texts and facts are resampled likewise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from lora_align.console import table
from lora_align.errors import UserError
from lora_align.evaluate.figures import Counted, counted_figures
from lora_align.evaluate.goals import GoalScore
from lora_align.evaluate.grid import weights_text
from lora_align.evaluate.measure import Measurement
from lora_align.metrics.intervals import RESAMPLES, WITHIN
from lora_align.policy.policy import PROMPT, Policy

Array = NDArray[numpy.float64]
KINDS = ("KL", "KL per token")  # a verdict must hold at equal KL of both kinds
SCALES = (0.5, 1.0, 1.5, 2.0)  # of a rival
MISSED = 0.05  # largest share of resamples in which a rival may miss the KL


@dataclass(frozen=True)
class Curve:
    """A policy at rising scales, with the figures of every scale."""

    name: str
    scales: Sequence[float]
    figures: Sequence[Mapping[str, Counted]]

    @classmethod
    def of(cls, name: str, points: Mapping[float, Measurement]) -> "Curve":
        """Return the curve through the measurements of some scales."""
        scales = sorted(points)
        return cls(name, scales, [counted_figures(points[scale]) for scale in scales])

    def names(self) -> list[str]:
        """Return the figures that every scale has."""
        return [name for name in self.figures[0] if all(name in of for of in self.figures)]

    def means(self, name: str, samples: Mapping[str, NDArray[numpy.int64]]) -> Array:
        """Return the mean of a figure at every scale for each sample of its groups: [samples, scales]."""
        return numpy.stack([of[name].means(samples[of[name].axis]) for of in self.figures], axis=1)


@dataclass(frozen=True)
class Difference:
    """A figure of a policy and of a rival at the same KL. The interval is that of policy minus rival."""

    policy: float
    rival: float
    low: float
    high: float


@dataclass(frozen=True)
class AtEqualKL:
    """The figures of a policy at one scale, and of a rival at the KL of this policy.

    `figures` is empty for a kind of KL that the rival's curve does not reach.
    """

    policy: str
    rival: str
    kl: Mapping[str, float]  # by kind
    reached: Mapping[str, float]  # the largest KL of the rival, by kind
    figures: Mapping[str, Mapping[str, Difference]]  # by kind of KL

    def verdict(self, score: GoalScore) -> str:
        """Return whether the policy is better by a score: the interval excludes 0 on the same side for both kinds."""
        found = [of.get(score.name) for of in self.figures.values()]
        if any(one is None for one in found):
            return "not comparable: the rival does not reach this KL"
        ahead = [(-one.high, -one.low) if score.lower else (one.low, one.high) for one in found if one]
        if all(low > 0 for low, _ in ahead):
            return "better"
        return "worse" if all(high < 0 for _, high in ahead) else "undecided"

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def rows(self, score: GoalScore | None) -> Iterator[list[str]]:
        """Yield a row for each figure: both values at equal KL per answer, and the difference with its interval."""
        for name, one in self.figures[KINDS[0]].items():
            difference = f"{one.policy - one.rival:+.3g} ({one.low:+.3g} to {one.high:+.3g})"
            verdict = self.verdict(score) if score and name == score.name else ""
            yield [name, f"{one.policy:.3g}", f"{one.rival:.3g}", difference, verdict]


def scaled(policy: Policy, scale: float) -> str:
    """Return the word of a policy with its weights, or the strength of its system prompt, times a scale."""
    if policy.prompted:
        return f"{PROMPT}@{scale * policy.prompted.strength:g}:{policy.prompted.text}"
    if not policy.weights or policy.conditioned:
        raise UserError(f"--against {policy.name}: only weights, adapters and prompts have a scale")
    return weights_text({key: scale * weight for key, weight in policy.weights.items()})


def compare_at_equal_kl(policy: Curve, rival: Curve) -> list[AtEqualKL]:
    """Compare a rival with every scale of a policy except 0."""
    names = [name for name in policy.names() if name in rival.names() and name not in KINDS]
    samples = _samples([*policy.figures, *rival.figures])
    ours, theirs = ({name: of.means(name, samples) for name in [*names, *KINDS]} for of in (policy, rival))
    compared = []
    for place, scale in enumerate(policy.scales):
        if scale:
            figures = {
                kind: {
                    name: found
                    for name in names
                    if (found := _difference(ours[name][:, place], ours[kind][:, place], theirs[kind], theirs[name]))
                }
                for kind in KINDS
            }
            kl = {kind: float(ours[kind][0, place]) for kind in KINDS}
            reached = {kind: float(theirs[kind][0].max()) for kind in KINDS}
            compared.append(AtEqualKL(f"{policy.name}={scale:g}", rival.name, kl, reached, figures))
    return compared


def summary(compared: Sequence[AtEqualKL], score: GoalScore | None) -> str:
    """Return a table for each comparison."""
    parts = []
    for one in compared:
        kl = ", ".join(f"{kind} {value:.3g}" for kind, value in one.kl.items())
        heading = f"{one.policy} against {one.rival} at equal KL ({kl})"
        rows = list(one.rows(score))
        least = f"not comparable: the rival's KL is between 0 and {one.reached[KINDS[0]]:.3g}"
        body = table(["", one.policy, "rival", "difference (95 %)", "verdict"], rows) if rows else least
        parts.append(f"{heading}\n{body}")
    return "\n\n".join(parts)


def _samples(figures: Sequence[Mapping[str, Counted]]) -> dict[str, NDArray[numpy.int64]]:
    """Return samples of the groups of every axis [1 + RESAMPLES, groups]. The first sample is the whole axis."""
    sizes: dict[str, int] = {}
    for one in (one for of in figures for one in of.values()):
        sizes[one.axis] = max(one.groups, sizes.get(one.axis, 0))
    draw = numpy.random.default_rng(0)
    return {
        axis: numpy.concatenate([numpy.arange(size)[None], draw.integers(0, size, (RESAMPLES, size))])
        for axis, size in sorted(sizes.items())
    }


def _difference(ours: Array, kl: Array, distances: Array, theirs: Array) -> Difference | None:
    """Return the difference of a figure at a KL [samples]; None if the rival misses it too often.

    The rival has distances and figures [samples, scales].
    """
    rival = numpy.array([_interpolated(*row) for row in zip(kl, distances, theirs, strict=True)])
    reached = numpy.isfinite(rival)
    if not reached[0] or 1 - reached[1:].mean() > MISSED:
        return None
    low, high = numpy.percentile((ours - rival)[1:][reached[1:]], WITHIN)
    return Difference(float(ours[0]), float(rival[0]), float(low), float(high))


def _interpolated(kl: float, distances: Array, values: Array) -> float:
    """Return the value where rising scales first reach a KL; nan if they do not."""
    for place in range(1, len(distances)):
        low, high = distances[place - 1], distances[place]
        if min(low, high) <= kl <= max(low, high) and low != high:
            share = (kl - low) / (high - low)
            return float(values[place - 1] + share * (values[place] - values[place - 1]))
    return math.nan

"""Directions for conditioned policies (`--want`): unit vectors over objectives, and their system messages."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_align.errors import UserError, nearest
from lora_align.mix_weights import parse_weights

if TYPE_CHECKING:
    from jinja2 import Template

TRIES = 1_000_000  # samples; a region that none of them hits counts as empty


@dataclass(frozen=True)
class Want:
    """A direction of a conditioned policy: a unit vector over objectives. It is not a `rankers.Direction`."""

    weights: Mapping[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Want":
        """Normalise weights to length 1."""
        length = math.hypot(*weights.values())
        if not 0 < length < math.inf:
            raise UserError("a direction needs at least one weight that is not 0")
        return cls({name: weight / length for name, weight in weights.items()})

    @classmethod
    def parse(cls, text: str, objectives: Sequence[str]) -> "Want":
        """Parse `helpfulness=0.8,verbosity=-0.6` and normalise it; an objective that is not named gets 0."""
        weights = parse_weights(text)
        for name in weights:
            if name not in objectives:
                known = ", ".join(objectives)
                hint = nearest(name, list(objectives))
                raise UserError(f"the policy has no objective {name!r}{hint} (its objectives: {known})")
        return cls.of({name: weights.get(name, 0.0) for name in objectives})

    def value(self, rewards: Mapping[str, float]) -> float:
        """Return vᵀr, the score of an answer with rewards r in this direction v."""
        return sum(weight * rewards[name] for name, weight in self.weights.items())

    def system_message(self, template: str) -> str:
        """Fill a Jinja template that may use `want` (the weights), `decimals` and `integers` (the weights as text)."""
        return _fill("ask", template, want=self.weights, decimals=self._decimals(), integers=self._integers())

    def _decimals(self) -> str:
        """Return the paper's format: `helpfulness*0.8 - verbosity*0.6`."""
        text = ""
        for name, weight in self.weights.items():
            weight = round(weight, 2)
            sign = ("- " if weight < 0 else "+ ") if text else ("-" if weight < 0 else "")
            text += f"{' ' if text else ''}{sign}{name}*{abs(weight):g}"
        return text

    def _integers(self) -> str:
        """Return the format of the paper's released model: `helpfulness*80 + verbosity*-60`."""
        return " + ".join(f"{name}*{round(100 * weight)}" for name, weight in self.weights.items())

    def __str__(self) -> str:
        return " ".join(f"{name}={weight:.2f}" for name, weight in self.weights.items())


def sample_direction(region: Mapping[str, Sequence[float]], rng: random.Random) -> Want:
    """Sample uniformly from the part of the unit sphere where every weight lies between its two bounds."""
    for _ in range(TRIES):
        want = Want.of({name: rng.gauss() for name in region})
        if all(low <= want.weights[name] <= high for name, (low, high) in region.items()):
            return want
    bounds = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in region.items())
    raise UserError(f"rsf.directions: the bounds {bounds} contain almost no unit vector; widen them")


def scores_message(scores: Mapping[str, float], template: str) -> str:
    """Fill a Jinja template that may use `scores` and `listed` (`helpfulness: 80, verbosity: 25`)."""
    listed = ", ".join(f"{name}: {score:.0f}" for name, score in scores.items())
    return _fill("steer", template, scores=scores, listed=listed)


def _fill(key: str, template: str, **values: Any) -> str:
    from jinja2 import TemplateError

    try:
        return _compile(template).render(values).strip()
    except (TemplateError, TypeError, ValueError, ArithmeticError) as fault:
        raise UserError(f"rsf.{key}: {fault} (the template may use {', '.join(values)})") from fault


@lru_cache
def _compile(template: str) -> "Template":
    """Compile a template once for all prompts, in a sandbox because recipes come from other people."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)

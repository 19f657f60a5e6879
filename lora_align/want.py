"""What a person wants of a conditioned policy: a direction over objectives, drawn or given, and how it is asked for."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_align.errors import UserError, nearest
from lora_align.weights import parse_weights

if TYPE_CHECKING:
    from jinja2 import Template

TRIES = 1_000_000  # draws from the sphere until a region counts as empty


@dataclass(frozen=True)
class Want:
    """A unit vector over named objectives."""

    weights: Mapping[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Want":
        """Any weights, brought to length 1."""
        length = math.hypot(*weights.values())
        if not 0 < length < math.inf:
            raise UserError("a direction needs at least one weight that is not 0")
        return cls({name: weight / length for name, weight in weights.items()})

    @classmethod
    def parse(cls, text: str, objectives: Sequence[str]) -> "Want":
        """`helpfulness=0.8,verbosity=-0.6`; an objective that is not named gets 0."""
        given = parse_weights(text)
        for name in given:
            if name not in objectives:
                known = ", ".join(objectives)
                raise UserError(
                    f"the policy knows no objective {name!r}{nearest(name, list(objectives))} (it knows: {known})"
                )
        return cls.of({name: given.get(name, 0.0) for name in objectives})

    def value(self, rewards: Mapping[str, float]) -> float:
        """vᵀr: what an answer with these rewards is worth to whoever wants this."""
        return sum(weight * rewards[name] for name, weight in self.weights.items())

    def asked(self, template: str) -> str:
        """The words that ask for it. A template has the weights as `want`, and both usual spellings of them."""
        return _filled("ask", template, want=self.weights, decimals=self._decimals(), integers=self._integers())

    def _decimals(self) -> str:
        """As in the paper: `helpfulness*0.8 - verbosity*0.6`."""
        said = ""
        for name, weight in self.weights.items():
            weight = round(weight, 2)
            sign = ("- " if weight < 0 else "+ ") if said else ("-" if weight < 0 else "")
            said += f"{' ' if said else ''}{sign}{name}*{abs(weight):g}"
        return said

    def _integers(self) -> str:
        """As the released model was asked: `helpfulness*80 + verbosity*-60`."""
        return " + ".join(f"{name}*{round(100 * weight)}" for name, weight in self.weights.items())

    def __str__(self) -> str:
        return " ".join(f"{name}={weight:.2f}" for name, weight in self.weights.items())


def drawn(region: Mapping[str, Sequence[float]], draw: random.Random) -> Want:
    """Uniform over the part of the unit sphere in which every weight lies between its two bounds."""
    for _ in range(TRIES):
        want = Want.of({name: draw.gauss() for name in region})
        if all(low <= want.weights[name] <= high for name, (low, high) in region.items()):
            return want
    bounds = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in region.items())
    raise UserError(f"rsf.directions: next to no unit vector has {bounds}; give them more room")


def scores_asked(scores: Mapping[str, float], template: str) -> str:
    """The words that ask for scores. A template has `scores`, and `listed`: `helpfulness: 80, verbosity: 25`."""
    listed = ", ".join(f"{name}: {points:.0f}" for name, points in scores.items())
    return _filled("steer", template, scores=scores, listed=listed)


def _filled(key: str, template: str, **values: Any) -> str:
    """A recipe's Jinja template with what it may name."""
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(values).strip()
    except (TemplateError, TypeError, ValueError) as fault:
        raise UserError(f"rsf.{key}: {fault} (it may name {', '.join(values)})") from fault


@lru_cache
def _compiled(template: str) -> "Template":
    """Once for thousands of prompts; in a sandbox, because recipes are passed on."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)

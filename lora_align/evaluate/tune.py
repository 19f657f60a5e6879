"""Weights without a grid: by gradient on held-out preferences, through the frozen model, within bounds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_align import runs
from lora_align.console import Screen, table
from lora_align.errors import RunFailedError
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.test_set import SAFE
from lora_align.evaluate.tune_objective import KL, LOSS, Bounds, Evaluated, TuneObjective
from lora_align.metrics import refusals
from lora_align.policy import vectors
from lora_align.recipe import Recipe, Training

STEPS, LONGEST = 8, 1.0  # and how far a step goes, the first one just so far
LONGER = 2.0  # times as far as the step before, at most: where a bound stops one, the next would run into it again
EDGE = 0.99  # of its bound: a weight that comes so near to it is at it
LEAST = 0.001  # share of pairs, by the aims, that a step has to promise for it to be taken, and to gain for another
TRIES, NEARER = 4, (0.2, 0.5)  # of a step that would go down, and what each can be of the one before
BACKWARDS, SPARE = 8, 0.995  # steps towards no weights where a bound is passed, and what each goes farther than needed
BACK, BACKS = 0.85, 8  # what weights are multiplied by while they refuse too much, and how often


@dataclass(frozen=True)
class Tuned:
    """Weights, and what they are told to do."""

    weights: Mapping[str, float]
    preferred: Mapping[str, float]  # the share of each preference's pairs that is preferred rightly
    kl: float
    loss: float | None  # nothing where no ordinary text was read
    refused: float | None  # nothing where no prompt is known to be safe
    steps: int


def tune_weights(
    evaluator: Evaluator, aims: Mapping[str, float], bounds: Bounds, settings: Training, screen: Screen
) -> Tuned:
    """Climb, then look at what is said to safe prompts, and go back as long as that is refused too often."""
    for lack in evaluator.test_set.lacks:
        screen.warn(lack)
    hill = TuneObjective(evaluator, aims, bounds, settings)
    with screen.progress("tune", STEPS) as progress:
        place, steps = climbed(hill, lambda step, weights: progress.show(step, weights))
        progress.show(STEPS, {})
    place, share = _less_refused(hill, within(hill, place))
    rounded = {name: round(weight, 3) for name, weight in _named(hill, place.weights).items()}
    lost = place.found[LOSS] if evaluator.test_set.texts else None
    return Tuned(rounded, place.preferred, place.found[KL], lost, share, steps)


def _less_refused(hill: TuneObjective, place: Evaluated) -> tuple[Evaluated, float | None]:
    """Back towards no weights until no more safe prompts are refused than is allowed, and the share that is."""
    evaluator = hill.evaluator
    if not any(question.kind == SAFE for question in evaluator.test_set.questions):
        return place, None
    share, allowed = share_refused(evaluator, _named(hill, place.weights)), hill.bounds.refused
    if share > allowed:  # the start policy, too, may refuse some
        allowed += share_refused(evaluator, {})
    for _ in range(BACKS):
        if share <= allowed:
            return place, share
        place = within(hill, hill.at(BACK * place.weights))
        share = share_refused(evaluator, _named(hill, place.weights))
    if share > allowed:
        raise RunFailedError(f"every weight tried refuses {share:.0%} of safe prompts; --refused allows more")
    return place, share


def within(hill: TuneObjective, place: Evaluated) -> Evaluated:
    """About as far out towards these weights as the bounds allow, which climbing may pass by a little where that pays.
    What they bound grows with the square of how far one goes, or, as the second step takes it, more slowly."""
    for power in (0.5, *[1.0] * BACKWARDS):
        beyond = hill.beyond(place)
        if beyond <= 1:
            return place
        place = hill.at(SPARE / beyond**power * place.weights)
    return place if hill.beyond(place) <= 1 else hill.at(0 * place.weights)


def climbed(hill: TuneObjective, report: Callable[[int, dict[str, str]], None]) -> tuple[Evaluated, int]:
    """By steps of BFGS from no weights at all: along the slope first, then by how the slope changes. A weight that has
    come to its bound stays there while the slope leads beyond."""
    most = hill.bounds.weight
    here = hill.at(torch.zeros(len(hill.names)))
    inverse, longest = LONGEST / max(float(here.slope.norm()), 1e-9) * torch.eye(len(hill.names)), LONGEST
    for step in range(1, STEPS + 1):
        free = (here.weights.abs() < most) | (here.weights * here.slope < 0)
        way = free * (inverse @ (free * here.slope))
        way = way * min(1.0, longest / max(float(way.norm()), 1e-9))
        there = _higher(hill, here, way)
        moved, gain = there.weights - here.weights, there.height - here.height
        bent = (moved != 0) * (here.slope - there.slope)  # what stays at a bound has no say in how others go on
        here, longest = there, min(LONGEST, LONGER * float(moved.norm()))
        report(step, {name: f"{weight:.2f}" for name, weight in _named(hill, here.weights).items()})
        if gain < LEAST:
            return here, step
        if float(moved @ bent) > 0:
            left = torch.eye(len(moved)) - torch.outer(moved, bent) / (moved @ bent)
            inverse = left @ inverse @ left.T + torch.outer(moved, moved) / (moved @ bent)
    return here, STEPS


def _higher(hill: TuneObjective, here: Evaluated, way: torch.Tensor) -> Evaluated:
    """Along the way, or here: where it would go down, to the top of the parabola that has this slope and goes through
    that place. On the way to a top half of what the slope promises is gained."""
    most = hill.bounds.weight
    for _ in range(TRIES):
        goal = (here.weights + way).clamp(-most, most)
        goal = torch.where(goal.abs() > EDGE * most, most * goal.sign(), goal)
        promised = float((goal - here.weights) @ here.slope)
        if promised / 2 < LEAST:
            break
        there = hill.at(goal)
        if there.height > here.height:
            return there
        way = way * min(max(promised / (2 * (promised + here.height - there.height)), NEARER[0]), NEARER[1])
    return here


def parts(name: str, count: int, recipe: Recipe, runs_dir: Path) -> list[str]:
    """The names of so many stretches of a preference's layers."""
    update = vectors.find(name, runs_dir, recipe.preferences).load()
    return vectors.stretches(name, vectors.layer_count(update), count)


def summary(tuned: Tuned, runs_dir: Path) -> str:
    """The weights, how far they go, and how to have them."""
    weights = [[name, f"{weight:.2f}"] for name, weight in tuned.weights.items()]
    shares = [[name, f"{share:.0%}"] for name, share in tuned.preferred.items()]
    far = f"from the start policy: {tuned.kl:.3f} nats a token"
    if tuned.loss is not None:
        far += f", {tuned.loss:+.3f} on ordinary text"
    if tuned.refused is not None:
        far += f"; refuses {tuned.refused:.0%} of safe prompts"
    words = f"merge --weights {','.join(f'{name}={weight:g}' for name, weight in tuned.weights.items())}"
    return "\n".join(
        [
            table(["", "weight"], weights) + "\n",
            table(["", "pairs preferred"], shares) + "\n",
            far,
            runs.command(words, runs_dir),
        ]
    )


def as_json(tuned: Tuned) -> dict[str, Any]:
    """As plain data."""
    return asdict(tuned)


def _named(hill: TuneObjective, weights: torch.Tensor) -> dict[str, float]:
    return dict(zip(hill.names, weights.tolist(), strict=True))


def share_refused(evaluator: Evaluator, weights: Mapping[str, float]) -> float:
    """Share of safe prompts whose one answer refuses."""
    policies = evaluator.policies
    policies.activate(policies.policies[0].at(weights))
    prompts = [question.prompt for question in evaluator.test_set.questions if question.kind == SAFE]
    drawn = [one for batch in policies.sampler.draw(prompts, 1, evaluator.test_set.sampling) for one in batch]
    return sum(refusals.refuses(one.text) for one in drawn) / max(len(drawn), 1)

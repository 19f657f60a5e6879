"""The command `tune`: find weights by gradient on held-out pairs through the frozen model, within bounds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_align import refusals, runs
from lora_align.console import Screen, table
from lora_align.errors import RunFailedError
from lora_align.evaluate.measure import FOLDER, Evaluator
from lora_align.evaluate.test_set import SAFE, read_test_set
from lora_align.evaluate.tune_objective import KL, LOSS, Bounds, Evaluation, TuneObjective
from lora_align.model import base as bases
from lora_align.plan.stages import TUNE_PAIRS
from lora_align.policy import vectors
from lora_align.policy.policy import weighted
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Recipe, Training

STEPS, MAX_STEP = 8, 1.0  # the first step has the length MAX_STEP
GROWTH = 2.0  # maximum ratio of a step to the last one; a longer step would pass the bound that shortened the last one
SNAP = 0.99  # a weight beyond this share of its bound is set to the bound
MIN_GAIN = 0.001  # a step is tried if it promises this gain of the objective; the search ends after a smaller gain
TRIES, SHRINK = 4, (0.2, 0.5)  # tries of the line search; each is between 0.2 and 0.5 times as long as the last
PULLS, TARGET = 8, 0.995  # tries to scale weights back within bounds, and the share of a bound to aim at
REFUSAL_SHRINK, REFUSAL_TRIES = 0.85, 8  # factor on weights that refuse too many safe prompts, and number of tries


@dataclass(frozen=True)
class Baseline:
    """Weights that need no search, and the figures at these weights."""

    weights: Mapping[str, float]
    preferred: Mapping[str, float]
    kl: float
    loss: float | None
    within_bounds: bool  # of KL and text loss


@dataclass(frozen=True)
class Tuned:
    """Weights within bounds, and the figures at these weights."""

    weights: Mapping[str, float]
    preferred: Mapping[str, float]  # accuracy on held-out pairs, for each preference with enough of them
    kl: float
    loss: float | None  # None without ordinary text
    refused: float | None  # None without safe prompts
    steps: int
    baselines: Mapping[str, Baseline]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self, runs_dir: Path) -> str:
        """Return the weights, the figures, and the command that merges the weights."""
        weights = [[name, f"{weight:.2f}"] for name, weight in self.weights.items()]
        shares = [[name, f"{share:.0%}"] for name, share in self.preferred.items()]
        figures = f"from the start policy: KL {self.kl:.3f} nats per token"
        if self.loss is not None:
            figures += f", text loss {self.loss:+.3f}"
        if self.refused is not None:
            figures += f"; refuses {self.refused:.0%} of safe prompts"
        merge = f"merge --weights {','.join(f'{name}={weight:g}' for name, weight in self.weights.items())}"
        tables = [table(["", "weight"], weights) + "\n"]
        tables += [table(["", "accuracy"], shares) + "\n"] if shares else []
        tables += [f"without a search:\n{self._baselines()}\n"]
        return "\n".join([*tables, figures, f"next: {runs.command(merge, runs_dir)}"])

    def _baselines(self) -> str:
        """Return a table of the baselines."""
        rows = [
            [
                name,
                " ".join(f"{weight:.2f}" for weight in one.weights.values()),
                *(f"{one.preferred[of]:.0%}" for of in self.preferred),
                f"{one.kl:.3f}",
                "" if one.loss is None else f"{one.loss:+.3f}",
                "yes" if one.within_bounds else "no",
            ]
            for name, one in self.baselines.items()
        ]
        accuracies = [f"accuracy {name}" for name in self.preferred]
        return table(["", "weights", *accuracies, "KL", "text loss", "within bounds"], rows)


def tune_weights(
    aims: Mapping[str, float], bounds: Bounds, recipe: Recipe, runs_dir: Path, screen: Screen, *, groups: int
) -> Tuned:
    """Find the weights of trained preferences for aims of any sum, with `groups` weights per vector."""
    recipe = replace(recipe, eval=replace(recipe.eval, pairs=min(recipe.eval.pairs, TUNE_PAIRS)))
    names = [part for name in aims for part in group_names(name, groups, recipe, runs_dir)]
    policy = weighted(dict.fromkeys(names, 1.0), recipe, runs_dir)
    policies = PolicySet.of([policy], recipe, bases.find(recipe.base), runs_dir, screen)
    evaluator = Evaluator(policies, read_test_set(recipe, screen, aims), runs_dir / FOLDER)
    shares = {name: share / sum(aims.values()) for name, share in aims.items()}
    return search_weights(evaluator, shares, bounds, recipe.dpo, screen)


def search_weights(
    evaluator: Evaluator, aims: Mapping[str, float], bounds: Bounds, settings: Training, screen: Screen
) -> Tuned:
    """Maximise the objective, then shrink the weights until they are within all bounds."""
    for gap in evaluator.test_set.gaps:
        screen.warn(gap)
    objective = TuneObjective(evaluator, aims, bounds, settings)
    with screen.progress("tune", STEPS) as progress:
        progress.show(0, {"now": "the start policy"})  # which takes minutes on a CPU
        best, steps = maximise(objective, progress.show)
        if steps < STEPS:
            progress.show(STEPS, {})
    best, refused = _shrink_until_answered(objective, within_bounds(objective, best))
    weights = {name: round(weight, 3) for name, weight in objective.named(best.weights).items()}
    loss = best.figures[LOSS] if evaluator.test_set.texts else None
    return Tuned(weights, best.preferred, best.figures[KL], loss, refused, steps, baselines(objective))


def baselines(objective: TuneObjective) -> dict[str, Baseline]:
    """Measure the mixes of weights 1, and of weights that give all vectors the same norm, with a mean weight of 1."""
    updates = objective.policies.mixer.updates
    inverse = 1 / torch.tensor([max(float(updates[name].norm()), 1e-12) for name in objective.names])
    ones, has_texts = torch.ones(len(objective.names)), bool(objective.evaluator.test_set.texts)
    measured = {
        name: objective.at(weights)
        for name, weights in {"1 each": ones, "equal norms": inverse / inverse.mean()}.items()
    }
    return {
        name: Baseline(
            objective.named(one.weights),
            one.preferred,
            one.figures[KL],
            one.figures[LOSS] if has_texts else None,
            objective.excess(one) <= 1,
        )
        for name, one in measured.items()
    }


def maximise(objective: TuneObjective, report: Callable[[int, dict[str, str]], None]) -> tuple[Evaluation, int]:
    """Run projected BFGS from weights of 0; return the last evaluation and the number of steps.

    A weight at its bound is fixed while its gradient points beyond the bound.
    """
    bound = objective.bounds.weight
    here = objective.at(torch.zeros(len(objective.names)))
    eye = torch.eye(len(objective.names))
    inverse, max_step = MAX_STEP / max(float(here.gradient.norm()), 1e-9) * eye, MAX_STEP
    for step in range(1, STEPS + 1):
        free = (here.weights.abs() < bound) | (here.weights * here.gradient < 0)
        direction = free * (inverse @ (free * here.gradient))
        direction = direction * min(1.0, max_step / max(float(direction.norm()), 1e-9))
        there = _line_search(objective, here, direction)
        s, gain = there.weights - here.weights, there.value - here.value
        y = (s != 0) * (here.gradient - there.gradient)  # without weights that stay at their bound
        here, max_step = there, min(MAX_STEP, GROWTH * float(s.norm()))
        report(step, {name: f"{weight:.2f}" for name, weight in objective.named(here.weights).items()})
        if gain < MIN_GAIN:
            return here, step
        if float(s @ y) > 0:
            left = eye - torch.outer(s, y) / (s @ y)
            inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    return here, STEPS


def _line_search(objective: TuneObjective, here: Evaluation, direction: torch.Tensor) -> Evaluation:
    """Return the first evaluation along the direction with a higher value, or `here`.

    After a lower value, try the maximum of the parabola through both values and the gradient. A parabola gains half of
    what its slope promises.
    """
    bound = objective.bounds.weight
    for _ in range(TRIES):
        goal = (here.weights + direction).clamp(-bound, bound)
        goal = torch.where(goal.abs() > SNAP * bound, bound * goal.sign(), goal)
        promised = float((goal - here.weights) @ here.gradient)
        if promised / 2 < MIN_GAIN:
            break
        there = objective.at(goal)
        if there.value > here.value:
            return there
        shrink = promised / (2 * (promised + here.value - there.value))
        direction = direction * min(max(shrink, SHRINK[0]), SHRINK[1])
    return here


def within_bounds(objective: TuneObjective, place: Evaluation) -> Evaluation:
    """Scale weights towards 0 until KL and text loss are within their bounds.

    The first try assumes that both grow with the square of the scale, the others that they grow linearly.
    """
    for power in (0.5, *[1.0] * PULLS):
        excess = objective.excess(place)
        if excess <= 1:
            return place
        place = objective.at(TARGET / excess**power * place.weights)
    return place if objective.excess(place) <= 1 else objective.at(0 * place.weights)


def _shrink_until_answered(objective: TuneObjective, place: Evaluation) -> tuple[Evaluation, float | None]:
    """Shrink weights until the mix refuses no more safe prompts than allowed; return the share that it refuses."""
    evaluator = objective.evaluator
    if not any(question.kind == SAFE for question in evaluator.test_set.questions):
        return place, None
    share, allowed = share_refused(evaluator, objective.named(place.weights)), objective.bounds.refused
    if share > allowed:  # the bound is relative to the start policy, which is measured only if necessary
        allowed += share_refused(evaluator, {})
    for _ in range(REFUSAL_TRIES):
        if share <= allowed:
            return place, share
        place = within_bounds(objective, objective.at(REFUSAL_SHRINK * place.weights))
        share = share_refused(evaluator, objective.named(place.weights))
    if share > allowed:
        raise RunFailedError(
            f"at all weights that were tried, the mix refuses too many safe prompts ({share:.0%} at the smallest, "
            f"{allowed:.0%} allowed); raise --refused"
        )
    return place, share


def share_refused(evaluator: Evaluator, weights: Mapping[str, float]) -> float:
    """Return the share of safe prompts that are refused, with one sampled answer each."""
    policies = evaluator.policies
    policies.activate(policies.policies[0].at(weights))
    prompts = [question.prompt for question in evaluator.test_set.questions if question.kind == SAFE]
    batches = policies.sampler.draw(prompts, 1, evaluator.test_set.sampling)
    refused = [refusals.refuses(answer.text) for batch in batches for answer in batch]
    return sum(refused) / max(len(refused), 1)


def group_names(name: str, count: int, recipe: Recipe, runs_dir: Path) -> list[str]:
    """Return the names of a vector's groups of layers, or its own name for one group."""
    if count == 1:
        return [name]
    update = vectors.find(name, runs_dir, recipe.preferences).load()
    return vectors.layer_groups(name, vectors.layer_count(update), count)

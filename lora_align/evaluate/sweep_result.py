"""The result of a sweep: its policies with their figures, and the front of policies that no other policy beats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_align.console import table
from lora_align.evaluate import equal_kl
from lora_align.evaluate.equal_kl import AtEqualKL
from lora_align.evaluate.figures import Figures
from lora_align.evaluate.goals import GoalScore
from lora_align.evaluate.grid import Weights
from lora_align.evaluate.measure import Measurement
from lora_align.metrics import pareto
from lora_align.want_direction import Want


@dataclass(frozen=True)
class SweepPolicy:
    """A measured policy of a sweep. `wins` are wins against the start policy."""

    name: str
    weights: Weights | None  # None for a policy that is not on the grid
    want: Want | None  # None for a policy that is not a sampled direction
    measurement: Measurement
    figures: Figures
    wins: Figures


@dataclass(frozen=True)
class SweepResult:
    """The front of a sweep, by the score of each axis and objective."""

    scores: Mapping[str, GoalScore]
    count: int  # number of policies
    front: Mapping[str, Mapping[str, float]]  # policy → score → value
    hypervolume: float
    worst: Mapping[str, float]  # score → its worst value; the corner from which the hypervolume is measured
    at_equal_kl: Sequence[AtEqualKL] = ()  # comparisons with rivals

    @classmethod
    def of(
        cls, policies: Sequence[SweepPolicy], scores: Mapping[str, GoalScore], at_equal_kl: Sequence[AtEqualKL] = ()
    ) -> "SweepResult":
        """Compute the front and its hypervolume over the policies that have every score."""
        scored = [one for one in policies if all(score.name in one.figures for score in scores.values())]
        values = [[score.signed_value(one.figures) for score in scores.values()] for one in scored]
        front = sorted(pareto.front(values) if scores else [], key=lambda i: values[i])
        worst = [min(column) for column in zip(*values, strict=True)]
        return cls(
            scores,
            len(policies),
            {
                scored[i].name: {str(score): scored[i].figures[score.name].value for score in scores.values()}
                for i in front
            },
            pareto.hypervolume(values, worst) if len(scores) > 1 else 0.0,
            {str(score): -w if score.lower else w for score, w in zip(scores.values(), worst, strict=False)},
            at_equal_kl,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the metrics of the run's manifest."""
        return {
            "scores": {goal: str(score) for goal, score in self.scores.items()},
            "points": self.count,
            "front": [{"word": name, **values} for name, values in self.front.items()],
            "hypervolume": self.hypervolume,
            "above": self.worst,
            "at equal KL": [one.as_json() for one in self.at_equal_kl],
        }

    def summary(self) -> str:
        """Return the front as a table, and its hypervolume."""
        rows = [[name, *(f"{value:.2f}" for value in values.values())] for name, values in self.front.items()]
        front = table(["", *map(str, self.scores.values())], rows)
        if not self.scores:
            return "no score fits the axes; name a judge with --by"
        parts = ["policies that no other policy beats:", front, self.hypervolume_text()]
        score = next(iter(self.scores.values()))
        return "\n\n".join(filter(None, [*parts, equal_kl.summary(self.at_equal_kl, score)]))

    def hypervolume_text(self) -> str:
        """Return the hypervolume and the corner from which it is measured; empty for fewer than two scores."""
        if len(self.scores) < 2:
            return ""
        corner = ", ".join(f"{name} {value:.2f}" for name, value in self.worst.items())
        return f"hypervolume {self.hypervolume:.3f}, measured from the worst value of each score: {corner}"

"""Policies side by side: every figure of each, and how often the first beats the others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_align.console import Screen, count, table
from lora_align.evaluate import server_judge
from lora_align.evaluate.figures import Figures, figures, wins
from lora_align.evaluate.measure import Evaluator
from lora_align.metrics.intervals import Estimate
from lora_align.model.sampler import Sampler


@dataclass(frozen=True)
class Comparison:
    """Figures of policies on the same prompts, and how often the first wins against each other one."""

    prompts: int
    answers: int  # of each policy
    policies: Mapping[str, Figures]
    wins: Mapping[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return a table with a row for each figure and a column for each policy, then the wins of the first one."""
        names = list(dict.fromkeys(name for figures_ in self.policies.values() for name in figures_))
        rows = [[name, *(_shown(figures_.get(name)) for figures_ in self.policies.values())] for name in names]
        parts = [
            f"{count(self.prompts, 'prompt')}, {count(self.answers, 'answer')} each; "
            "in brackets: 95 % intervals over prompts",
            table(["", *self.policies], rows),
        ]
        first = next(iter(self.policies))
        for other, by in self.wins.items():
            words = [self.policies[name]["words"].value for name in (first, other)]
            rows = [[name, _shown(figure)] for name, figure in by.items()]
            heading = f"{first} wins against {other} ({words[0]:.0f} words against {words[1]:.0f})"
            parts.append(
                "\n".join([heading, table(["by", "share"], rows)]) if rows else f"{heading}: no judge (--by, --judge)"
            )
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return self.summary()


def compare_policies(
    evaluator: Evaluator, screen: Screen, server: Sampler | None = None, tasks: Mapping[str, Figures] | None = None
) -> Comparison:
    """Measure all policies and compare the first with each other one: by judges, and by a served model if there is one.

    `tasks` are further figures of each policy.
    """
    found, test_set = list(evaluator.measure_all(screen)), evaluator.test_set
    against = {other.name: wins(found[0], other) for other in found[1:]}
    if server:
        for other in found[1:]:
            against[other.name] |= server_judge.compared(found[0], other, test_set, server, screen)
    everyone = {one.name: {**figures(one), **(tasks or {}).get(one.name, {})} for one in found}
    return Comparison(len(test_set.questions), test_set.answers, everyone, against)


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 2 if abs(estimate.value) < 100 else 0
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"

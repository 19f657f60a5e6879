"""The command `eval`: measure several policies, and compare the first with each other one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_align.console import Screen, count, table
from lora_align.evaluate import server_judge
from lora_align.evaluate.figures import Figures, figures, wins
from lora_align.evaluate.measure import Evaluator
from lora_align.metrics.intervals import Estimate
from lora_align.model.sampler_protocol import Sampler

SMALL = 0.1  # rows whose values are all below this get a third decimal


@dataclass(frozen=True)
class Comparison:
    """Figures of policies on the same prompts, and how often the first wins against each of the others."""

    prompts: int
    answers: int  # number of answers of each policy
    policies: Mapping[str, Figures]
    wins: Mapping[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Format a table with a row for each figure and a column for each policy, then the first policy's wins."""
        names = list(dict.fromkeys(name for figures_ in self.policies.values() for name in figures_))
        rows = [_row(name, [figures_.get(name) for figures_ in self.policies.values()]) for name in names]
        parts = [
            f"{count(self.prompts, 'prompt')}, {count(self.answers, 'answer')} by each policy; "
            "in brackets: 95 % bootstrap intervals",
            table(["", *self.policies], rows),
        ]
        first = next(iter(self.policies))
        for other, by_judge in self.wins.items():
            words = [self.policies[name]["words"].value for name in (first, other)]
            rows = [_row(name, [figure]) for name, figure in by_judge.items()]
            lengths = f"mean words: {words[0]:.0f}, {words[1]:.0f}"
            heading = f"{first} against {other} ({lengths})"
            parts.append(
                "\n".join([f"{heading}: share of answers won, a tie counts half", table(["by", "share"], rows)])
                if rows
                else f"{heading}: no judge was given (--by or --judge), so no share of answers won"
            )
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return self.summary()


def compare_policies(
    evaluator: Evaluator, screen: Screen, server: Sampler | None = None, tasks: Mapping[str, Figures] | None = None
) -> Comparison:
    """Measure all policies, and compare the first with each other one by the judges and by a served model, if given.

    `tasks` adds figures to each policy, by its name.
    """
    measurements, test_set = list(evaluator.measure_all(screen)), evaluator.test_set
    first, *others = measurements
    wins_against = {other.name: wins(first, other) for other in others}
    if server:
        for other in others:
            wins_against[other.name] |= server_judge.judge_wins(first, other, test_set, server, screen)
    policies = {one.name: {**figures(one), **(tasks or {}).get(one.name, {})} for one in measurements}
    return Comparison(len(test_set.questions), test_set.answers, policies, wins_against)


def _row(name: str, estimates: Sequence[Estimate | None]) -> list[str]:
    """Format a figure of several policies with equally many decimals."""
    largest = max((abs(estimate.value) for estimate in estimates if estimate), default=0.0)
    digits = 0 if largest >= 100 else 3 if 0 < largest < SMALL else 2
    texts = (
        [f"{round(number, digits) + 0.0:.{digits}f}" for number in (of.value, of.low, of.high)]
        if of
        else []  # never -0
        for of in estimates
    )
    return [name, *(f"{of[0]} ({of[1]} to {of[2]})" if of else "" for of in texts)]

"""The reported number that counts as success for a sweep's axis or a policy's objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align.metrics.intervals import Estimate
from lora_align.rankers import Ranker


@dataclass(frozen=True)
class GoalScore:
    """The name of a figure, and whether a lower value is better."""

    name: str
    lower: bool = False

    def signed_value(self, figures: Mapping[str, Estimate]) -> float:
        """Return the figure, negated if lower is better."""
        return -figures[self.name].value if self.lower else figures[self.name].value

    def __str__(self) -> str:
        return f"{self.name} (less is better)" if self.lower else self.name


def score_of(goal: str, names: Sequence[str], ranker: Ranker | None = None, *, lower: bool = False) -> GoalScore | None:
    """Return the score of a preference or objective, chosen among the names of figures; None if none fits.

    The first that exists is chosen: a judge's score of that name, `pair:NAME`, the head, length or refusals by which
    its pairs are ranked, the margin. `helpful@0-10` has the score of `helpful`. `lower` is True for an
    objective whose weights are at most 0 in all directions.
    """
    preference = goal.partition("@")[0]
    choices = [GoalScore(end, lower) for end in (f": {preference}", f"pair:{preference}")]
    if ranker and ranker.figure:
        choices.append(GoalScore(ranker.figure, ranker.lower))
    choices.append(GoalScore(f"margin {preference}"))
    return next((GoalScore(name, one.lower) for one in choices for name in names if name.endswith(one.name)), None)

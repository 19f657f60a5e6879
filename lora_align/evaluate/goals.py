"""The reported number that counts as success for a sweep's axis or a policy's objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align.metrics.intervals import Estimate
from lora_align.rankers import Ranker


@dataclass(frozen=True)
class Score:
    """The name of a figure, and whether a lower value is better."""

    name: str
    lower: bool = False

    def signed_value(self, figures: Mapping[str, Estimate]) -> float:
        """Return the figure, negated if lower is better."""
        return -figures[self.name].value if self.lower else figures[self.name].value

    def __str__(self) -> str:
        return f"{self.name} (less is better)" if self.lower else self.name


def score_of(goal: str, names: Sequence[str], ranker: Ranker | None = None, *, lower: bool = False) -> Score | None:
    """Return the score of a preference or objective, chosen among the names of figures; None if none fits.

    In order of choice: the oracle, `pair:`, a reward-model head of that name, the head or length that ranks its pairs,
    the margin. `helpful@0-10` has the score of `helpful`. `lower` is set for an objective whose weight is negative.
    """
    preference = goal.partition("@")[0]
    choices = [Score(end, lower) for end in (f"oracle: {preference}", f"pair:{preference}", f": {preference}")]
    if ranker and ranker.figure:
        choices.append(Score(ranker.figure, ranker.lower))
    choices.append(Score(f"margin {preference}"))
    return next((Score(name, one.lower) for one in choices for name in names if name.endswith(one.name)), None)

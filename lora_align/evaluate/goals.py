"""By which figure a goal is told: what an axis of a sweep, or an objective of a policy, is there for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align.metrics.intervals import Estimate
from lora_align.rankers import Ranker


@dataclass(frozen=True)
class Score:
    """A figure's name, and whether less of it is better."""

    name: str
    less: bool = False

    def worth(self, figures: Mapping[str, Estimate]) -> float:
        """More is better."""
        return -figures[self.name].value if self.less else figures[self.name].value

    def __str__(self) -> str:
        return f"{self.name} (less is better)" if self.less else self.name


def score_of(goal: str, names: Sequence[str], ranker: Ranker | None = None, *, less: bool = False) -> Score | None:
    """The best there is among the names: the oracle, its pair, a reward model's head of its name, what ranks its pairs,
    or margins on them; `helpful@0-10` is told as `helpful` is. `less` is what is wanted of an objective."""
    preference = goal.partition("@")[0]
    wanted = [Score(end, less) for end in (f"oracle: {preference}", f"pair:{preference}", f": {preference}")]
    if ranker and ranker.figure:
        wanted.append(Score(ranker.figure, ranker.lower))
    wanted.append(Score(f"margin {preference}"))
    return next((Score(name, one.less) for one in wanted for name in names if name.endswith(one.name)), None)

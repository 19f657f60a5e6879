"""Contestants side by side: every figure of each, and who wins against whom."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import Screen, count, table
from lora_align.evaluate import server_judge
from lora_align.evaluate.figures import Figures, figures, wins
from lora_align.evaluate.measure import Evaluator, Measured, measure_cached
from lora_align.evaluate.test_set import read_test_set
from lora_align.metrics.intervals import Estimate
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.sampler import Sampler
from lora_align.policy import contestants, judges
from lora_align.policy.contestants import Named
from lora_align.policy.judges import Judge
from lora_align.recipe import Recipe
from lora_align.train import reward

FOLDER = "eval"  # of the runs folder: whom was measured stays there


@dataclass(frozen=True)
class Evaluation:
    """Who is measured, and where what is found of them stays."""

    arena: Evaluator
    folder: Path

    def measured(self, screen: Screen) -> Iterator[Measured]:
        """One after the other, in their order, with progress by answers."""
        everyone, each = self.arena.field.contestants, len(self.arena.exam.questions) * self.arena.exam.samples
        with screen.progress("answers", each * len(everyone)) as progress:
            for number, contestant in enumerate(everyone):

                def report(done: int, before: int = number * each) -> None:
                    progress.show(before + done, {})

                yield measure_cached(self.arena, contestant, self.folder, report)


def open_evaluation(
    everyone: Sequence[Named],
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    by: Sequence[str] = (),
    others: Callable[[Base], Mapping[str, Judge]] = lambda base: {},
    preferences: Iterable[str] | None = None,
) -> Evaluation:
    """With everything read and checked; `others` judge beside those that are named. Held-out pairs are those of some
    `preferences`, or of all."""
    base = bases.find(recipe.base)
    field = contestants.policy_set(everyone, recipe, base, runs_dir, screen)
    named = by or ([reward.NAME] if runs.is_run(runs_dir / "reward" / reward.NAME) else [])
    panel = {name: judges.find(name, base, recipe, runs_dir) for name in named} | dict(others(base))
    return Evaluation(Evaluator(field, read_test_set(recipe, screen, preferences), panel), runs_dir / FOLDER)


def compare_policies(
    contest: Evaluation, screen: Screen, server: Sampler | None = None, asked: Mapping[str, Figures] | None = None
) -> dict[str, Any]:
    """Measure all; the first is set against each of the rest, by scores and by a language model if one is served.
    What each was `asked` besides is told with the rest."""
    found, exam = list(contest.measured(screen)), contest.arena.exam
    against = {other.name: wins(found[0], other) for other in found[1:]}
    if server:
        for other in found[1:]:
            against[other.name] |= server_judge.compared(found[0], other, exam, server, screen)
    everyone = {one.name: {**figures(one), **(asked or {}).get(one.name, {})} for one in found}
    return {
        "prompts": len(exam.questions),
        "answers": len(exam.questions) * exam.samples,
        "contestants": {name: _plain(of) for name, of in everyone.items()},
        "wins": {name: _plain(of) for name, of in against.items()},
    }


def _plain(of: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: asdict(figure) for name, figure in of.items()}


def summary(result: Mapping[str, Any]) -> str:
    """A line a figure, a column a contestant; then who wins how often, and how long the answers are."""
    everyone = result["contestants"]
    names = list(dict.fromkeys(name for figures_ in everyone.values() for name in figures_))
    rows = [[name, *(_shown(figures_.get(name)) for figures_ in everyone.values())] for name in names]
    parts = [
        f"{count(result['prompts'], 'prompt')}, {count(result['answers'], 'answer')} each; "
        "in brackets: 95 % intervals over prompts",
        table(["", *everyone], rows),
    ]
    first = next(iter(everyone))
    for other, by in result["wins"].items():
        words = [everyone[name]["words"]["value"] for name in (first, other)]
        rows = [[name, _shown(figure)] for name, figure in by.items()]
        heading = f"{first} wins against {other} ({words[0]:.0f} words against {words[1]:.0f})"
        parts.append(
            "\n".join([heading, table(["by", "share"], rows)]) if rows else f"{heading}: no judge (--by, --judge)"
        )
    return "\n\n".join(parts)


def _shown(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    estimate = Estimate(**figure)
    digits = 2 if abs(estimate.value) < 100 else 0
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"

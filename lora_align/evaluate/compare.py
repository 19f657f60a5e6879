"""Policies side by side: every figure of each, and how often the first beats the others."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_align.console import Screen, count, table
from lora_align.evaluate import server_judge
from lora_align.evaluate.figures import Figures, figures, wins
from lora_align.evaluate.measure import Evaluator
from lora_align.metrics.intervals import Estimate
from lora_align.model.sampler import Sampler


def compare_policies(
    evaluator: Evaluator, screen: Screen, server: Sampler | None = None, tasks: Mapping[str, Figures] | None = None
) -> dict[str, Any]:
    """Measure all policies and compare the first with each other one: by judges, and by a served model if there is one.

    `tasks` are further figures of each policy.
    """
    found, test_set = list(evaluator.measure_all(screen)), evaluator.test_set
    against = {other.name: wins(found[0], other) for other in found[1:]}
    if server:
        for other in found[1:]:
            against[other.name] |= server_judge.compared(found[0], other, test_set, server, screen)
    everyone = {one.name: {**figures(one), **(tasks or {}).get(one.name, {})} for one in found}
    return {
        "prompts": len(test_set.questions),
        "answers": test_set.answers,
        "policies": {name: _plain(of) for name, of in everyone.items()},
        "wins": {name: _plain(of) for name, of in against.items()},
    }


def _plain(of: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: asdict(figure) for name, figure in of.items()}


def summary(result: Mapping[str, Any]) -> str:
    """Return a table with a row for each figure and a column for each policy, then the wins of the first one."""
    everyone = result["policies"]
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

"""Write the page of `evidence.py`: a verdict on each claim, then the figures."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_choice as choice
import evidence_vectors as vectors
from evidence_item import FOLDER, Item
from report import record

ITEMS: list[Callable[[Path], Item]] = [
    vectors.control,
    vectors.rivals,
    vectors.later,
    vectors.geometry,
    vectors.knowledge,
    vectors.correlation,
    choice.three_users,
    choice.fronts,
    choice.open_questions,
]


LIMITS = Path(__file__).parent / "evidence" / "limits.md"


def lines(items: Sequence[Item], seconds: float, in_one_go: Mapping[str, int] | None) -> Iterator[str]:
    """Yield the lines of the page."""
    sittings = "in several sittings"
    if in_one_go:
        sittings = f"in one go of {in_one_go['processes']} processes that took {in_one_go['seconds'] / 60:.0f} minutes"
    yield "# Both papers in miniature"
    yield ""
    yield (
        "The demo world and its base of 0.9 M parameters in 4-bit, graded by its oracle: three data seeds, "
        "test prompts by which nothing was chosen, 95 % intervals over prompts. Grades are means over "
        'well-formed answers. In items 1, 2, 3, 5, 6 and 8, "more" and "less" mean: prompt by prompt, with '
        "an interval that excludes 0, and on every seed. The other items state their criterion. `just "
        "evidence` makes this page; its figures are in [evidence.json](evidence.json). A verdict says "
        "whether a claim held here, by a rule that was written before the figures were seen. Some rules "
        "became stricter afterwards: both of the first preferences must lose (3), a user's own direction "
        "must beat one direction for all (7), `tune` has a second pair of aims (9), fronts must lie apart on "
        "every seed (8), and facts compete with facts that are true of other subjects only (5). One rule "
        "became easier: differences are taken prompt by prompt; before, intervals of two means had to lie "
        "apart. "
        f"All jobs took {seconds / 60:.0f} minutes of one core, {sittings}."
    )
    yield ""
    yield LIMITS.read_text().strip()
    yield ""
    yield "| | verdict |"
    yield "|---|---|"
    for number, item in enumerate(items, 1):
        yield f"| {number} · {item.title} | {item.verdict} |"
    for number, item in enumerate(items, 1):
        yield from (
            "",
            f"## {number} · {item.title}",
            "",
            f"*{item.claim}*",
            "",
            f"**{item.verdict}**: {item.because}.",
        )
        for head, *rows in item.tables:
            yield from (
                "",
                f"| {' | '.join(head)} |",
                "|---" * len(head) + "|",
                *(f"| {' | '.join(row)} |" for row in rows),
            )
        for file, seen in item.pictures.items():
            yield from ("", f"![{seen}]({file})")


def write(work: Path, seconds: Mapping[str, float], in_one_go: Mapping[str, int] | None) -> None:
    """Write the page, its pictures and figures.

    `in_one_go` is the duration of a run that began with an empty folder and was not interrupted.
    """
    FOLDER.mkdir(exist_ok=True)
    items = [make(work) for make in ITEMS]
    total = sum(seconds.values())
    (FOLDER / "README.md").write_text("\n".join(lines(items, total, in_one_go)) + "\n", encoding="utf-8")
    figures: dict[str, Any] = {item.title: {"verdict": item.verdict, "figures": item.figures} for item in items}
    figures["seconds of all jobs, one core each"] = round(total)
    figures["from nothing, in one go"] = in_one_go
    (FOLDER / "evidence.json").write_text(json.dumps(_known(record(figures)), indent=1, allow_nan=False) + "\n")


def _known(value: Any) -> Any:
    """Replace NaN by None, because JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _known(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_known(of) for of in value]
    return None if isinstance(value, float) and math.isnan(value) else value

"""The page that `evidence.py` writes: a verdict on each claim, then what was found."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import evidence_items as of
from evidence_items import FOLDER, Item
from report import record

ITEMS: list[Callable[[Path], Item]] = [
    of.control,
    of.rivals,
    of.later,
    of.geometry,
    of.knowledge,
    of.correlation,
    of.three_users,
    of.fronts,
    of.open_questions,
]


def lines(items: Sequence[Item]) -> Iterator[str]:
    """The page."""
    yield "# Both papers in miniature"
    yield ""
    yield (
        "The built-in world, its base of 0.9 M parameters in 4-bit, graded by its oracle: three data seeds, "
        "test prompts "
        "that nothing was chosen by, 95 % intervals over prompts. `just evidence` makes this page; the "
        "figures behind it "
        "are in [evidence.json](evidence.json). A verdict says whether the claim held here, by a rule written before."
    )
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


def write(work: Path, seconds: Mapping[str, float]) -> None:
    """The page, its pictures and figures."""
    FOLDER.mkdir(exist_ok=True)
    items = [make(work) for make in ITEMS]
    (FOLDER / "README.md").write_text("\n".join(lines(items)) + "\n", encoding="utf-8")
    figures = {item.title: {"verdict": item.verdict, "figures": item.figures} for item in items}
    figures["seconds of all jobs, one core each"] = round(sum(seconds.values()))
    (FOLDER / "evidence.json").write_text(json.dumps(record(figures), indent=1) + "\n")

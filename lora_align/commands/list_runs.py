"""The command `list`: all runs with their origin and one figure. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import Screen, count, table
from lora_align.runs import Run


@dataclass(frozen=True)
class RunList:
    """The runs of a folder, in order of publication."""

    folder: Path
    runs: Sequence[Run]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"runs": [run.as_json() for run in self.runs]}

    def summary(self) -> str:
        """Return a table with a line for each run, or nothing if there is none. One base is named above the table."""
        bases = {run.manifest.base["model"] for run in self.runs}
        rows = [
            [
                run.path.relative_to(self.folder).as_posix(),
                run.manifest.created[5:16].replace("T", " "),  # without the year, to fit 80 columns
                _origin(run, with_base=len(bases) > 1),
                headline_figure(run),
            ]
            for run in self.runs
        ]
        above = f"base: {_short(bases.pop())}\n\n" if len(bases) == 1 else ""
        return above + table(["run", "made (UTC)", "from", "measured"], rows) if rows else ""


def list_runs(folder: Path, screen: Screen) -> RunList:
    """Return the runs below a folder. Damaged ones are skipped with a warning."""
    listed = RunList(folder, runs.list_runs(folder, screen))
    if not listed.runs and not screen.as_json:
        screen.note(f"no runs in {folder}/ yet")
    return listed


def _origin(run: Run, *, with_base: bool) -> str:
    """Return the origin of a run: the terms of a mix, or its data and base."""
    if run.manifest.stage == "mix":
        parts = [f"{p['weight']:+g} {p['name']}" for p in run.manifest.parents]
        return " ".join((["start"] if run.manifest.contains_start else []) + parts)
    # `reach` sets the vectors, `sweep` the axes
    measured = run.manifest.method.get("vectors") or run.manifest.method.get("axes") or {}
    data = run.manifest.data
    tables = [data] if "source" in data else [table for table in data.values() if isinstance(table, dict)]
    known = dict.fromkeys(_short(str(table["source"])) for table in tables if "source" in table)
    base = _short(run.manifest.base["model"]) if with_base else ""
    start = "on the start adapter" if run.manifest.start else ""
    return " ".join(filter(None, [" + ".join(known) or " ".join(measured), base and f"({base})", start]))


def _short(name: str) -> str:
    """Return the name of a file without its folder, so that a line fits the terminal. Other names are unchanged."""
    return name.rpartition("/")[2] if name.startswith("/") or name.count("/") > 1 else name


def headline_figure(run: Run) -> str:
    """Return the most telling figure of a run, or that it is unconverged."""
    held_out = run.manifest.metrics.get("held_out", {})
    if reasons := run.manifest.unconverged:
        return "diverged" if any(reason.startswith(runs.DIVERGED) for reason in reasons) else "unconverged"
    if pairs := held_out.get("pairs"):
        accuracy = held_out.get("accuracy")
        return f"{count(pairs, 'pair')}: too few" if accuracy is None else f"accuracy {accuracy:.2f}"
    if run.manifest.stage == "mix":
        return f"rank {run.manifest.method.get('rank', '?')}"
    if run.manifest.stage == "reward":
        return count(len(held_out.get("heads", {})), "head")
    if run.manifest.stage == "pairs":
        return count(run.manifest.data["pairs"], "pair")
    if "points" in run.manifest.metrics:
        return count(run.manifest.metrics["points"], "point")
    return f"norm {run.manifest.metrics['norm']:.2f}" if "norm" in run.manifest.metrics else ""

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
        """Return a table with a line for each run, or nothing if there is none."""
        rows = [
            [
                run.path.relative_to(self.folder).as_posix(),
                run.manifest.created[5:16].replace("T", " "),  # without the year, to fit 80 columns
                _origin(run),
                headline_figure(run),
            ]
            for run in self.runs
        ]
        return table(["run", "made (UTC)", "from", "measured"], rows) if rows else ""


def list_runs(folder: Path, screen: Screen) -> RunList:
    """Return the runs below a folder. Damaged ones are skipped with a warning."""
    listed = RunList(folder, runs.list_runs(folder, screen))
    if not listed.runs and not screen.as_json:
        screen.note(f"no runs in {folder}/ yet")
    return listed


def _origin(run: Run) -> str:
    """Return the origin of a run: the terms of a mix, or its data and base."""
    if run.manifest.stage == "mix":
        parts = [f"{p['weight']:+g} {p['name']}" for p in run.manifest.parents]
        return " ".join((["start"] if run.manifest.contains_start else []) + parts)
    base = run.manifest.base["model"] + (" + start" if run.manifest.start else "")
    # `reach` sets the vectors, `sweep` the axes
    measured = run.manifest.method.get("vectors") or run.manifest.method.get("axes") or {}
    source = run.manifest.data.get("source") or " ".join(measured)
    return f"{source} ({base})" if source else base


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
    if "points" in run.manifest.metrics:
        return count(run.manifest.metrics["points"], "point")
    return f"norm {run.manifest.metrics['norm']:.2f}" if "norm" in run.manifest.metrics else ""

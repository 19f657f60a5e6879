"""Save results as JSON, with the machine and the versions that produced them."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lora_align.plan.device import matrix_rate
from lora_align.runs import library_versions

RESULTS = Path(__file__).parent / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Print and save one benchmark's figures."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record(figures), indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def record(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with the place, the time and the commit of their measurement."""
    own = stamp()
    machine = {
        "processor": own["processor"],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "GFLOP/s of a float32 matrix product": round(matrix_rate(torch.device("cpu"), torch.float32) / 1e9),
    }
    return {
        "made": own["made"],
        "commit": own["commit"],
        "machine": machine,
        "versions": library_versions(),
        "figures": figures,
    }


def stamp() -> dict[str, str]:
    """Return date, commit and processor, for a part of a benchmark that may continue on another machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {"made": datetime.now(UTC).date().isoformat(), "commit": _commit(), "processor": processor}


def _commit() -> str:
    """Return the commit of the measured code, or of the last code for a resumed benchmark.

    Changes in the benchmarks' own output do not count as changes of the code.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":!results", ":!evidence")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def once(work: Path, name: str, make: Callable[[], Any]) -> Any:
    """Return the stored figures of that name, or measure and store them, so that a long benchmark can be resumed."""
    file = work / "measured" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make()))
        part.replace(file)
    return json.loads(file.read_text())

"""Results as JSON beside the machine and the versions they came from."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_align.runs import library_versions

RESULTS = Path(__file__).parent / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Print and keep one benchmark's figures."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record(figures), indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def record(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures beside where, when and by which code they were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    machine = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    return {
        "made": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine,
        "versions": library_versions(),
        "figures": figures,
    }


def _commit() -> str:
    """Of the code that was measured, where it is known; of what a resumed benchmark ended with. What benchmarks have
    written before is no code."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":!results", ":!evidence")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def once(work: Path, name: str, make: Callable[[], Any]) -> Any:
    """What was measured before under that name, or what is measured now: a long benchmark goes on where it was."""
    file = work / "measured" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make()))
        part.replace(file)
    return json.loads(file.read_text())

"""Results as JSON beside the machine and the versions they came from."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_align.runs import library_versions

RESULTS = Path(__file__).parent / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Print and keep one benchmark's figures."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    machine = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    record = {
        "made": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": library_versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(figures, indent=2))

"""Time training alone and beside other busy programs, one on each core.

Compare this program's wait setting for torch's threads with libgomp's default (300,000 iterations of a spin loop).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from report import save

COMMAND = str(Path(sys.executable).with_name("lora-align"))
WAITS = {"here": {}, "by default": {"GOMP_SPINCOUNT": "300000"}}
OTHERS = {"alone": 0, "beside busy programs": os.cpu_count() or 1}
RUNS = 5


def trained(cwd: Path, waits: dict[str, str], others: int) -> float:
    """Return the wall time of a command that trains one adapter."""
    with ExitStack() as busy:
        for _ in range(others):
            busy.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
        began = time.perf_counter()
        words = [COMMAND, "dpo", "--pref", "helpful", "--direction", "pos", "--force", "--quiet"]
        subprocess.run(words, cwd=cwd, env={**os.environ, **waits}, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    """Run the settings in turns, so that the machine's load affects both alike."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    times: dict[str, dict[str, list[float]]] = {company: {way: [] for way in WAITS} for company in OTHERS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_ALIGN_CACHE"] = str(Path(folder) / "cache")
        trained(Path(folder), {}, 0)  # caches the start policy's log-probabilities of the answers
        for _ in range(RUNS):
            for company, others in OTHERS.items():
                for way, waits in WAITS.items():
                    times[company][way].append(round(trained(Path(folder), waits, others), 1))
    figures = {
        company: {
            **{way: {"median": statistics.median(seconds), "all": seconds} for way, seconds in ways.items()},
            "here, in shares of the default": round(
                statistics.median(mine / theirs for mine, theirs in zip(*ways.values(), strict=True)), 3
            ),
        }
        for company, ways in times.items()
    }
    save("crowded", figures)


if __name__ == "__main__":
    main()

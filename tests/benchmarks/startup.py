"""Time light commands (targets: --help 0.2 s, list 0.3 s), an answer (5 s), and merges (3 s, and 5 s for 8B shapes).

The first two figures show how fast the machine is at the moment: Python alone, and the import of torch.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import algebra
from report import RESULTS, save

COMMAND = str(Path(sys.executable).with_name("lora-align"))
LIGHT = {
    "--help": ["--help"],
    "recipes": ["recipes"],
    "list": ["list"],
    "a recipe with a fault": ["dpo", "--pref", "helpful", "--set", "dpo.betta=1"],
}
BASELINES = {"python": "pass", "import torch": "import torch"}
RUNS = 15
MERGE = ["merge", "--quiet"]


def seconds(words: list[str], cwd: Path, times: int, program: str = COMMAND) -> dict[str, float]:
    """Return the median and the longest wall time of a whole process, after one warm-up."""
    durations = []
    for _ in range(times + 1):
        start = time.perf_counter()
        subprocess.run([program, *words], cwd=cwd, capture_output=True, check=False)
        durations.append(time.perf_counter() - start)
    return {"median": round(statistics.median(durations[1:]), 3), "worst": round(max(durations[1:]), 3)}


def main() -> None:
    """Measure in a folder with a small trained workspace."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        train = [COMMAND, "dpo", "--pref", "helpful", "--limit", "32", "--quiet"]
        subprocess.run(train, cwd=cwd, check=True, capture_output=True)
        subprocess.run([COMMAND, "merge", "--weights", "helpful=1"], cwd=cwd, check=True, capture_output=True)
        figures = {name: seconds(["-c", code], cwd, RUNS, sys.executable) for name, code in BASELINES.items()}
        figures |= {name: seconds(words, cwd, RUNS) for name, words in LIGHT.items()}
        figures["merge, two vectors of the demo"] = seconds([*MERGE, "--weights", "helpful=1", "--force"], cwd, 5)
        adapters = [algebra.adapter(cwd / f"adapter{seed}", seed, algebra.LAYERS) for seed in range(4)]
        weights = ",".join(f"{path}={weight}" for path, weight in zip(adapters, (1, 0.5, -0.5, 0.25), strict=True))
        four = [*MERGE, "--weights", weights, "--out", str(cwd / "merged"), "--force"]
        figures["merge, four adapters of 8B shapes"] = seconds(four, cwd, 5)
        shutil.rmtree(cwd / "merged")
        figures["chat --prompt"] = seconds(["chat", "--prompt", "Tell me about rain."], cwd, 5)
        settings = ["eval.count=4", "eval.samples=1", "eval.pairs=4", "eval.max_new_tokens=8"]
        few = [word for setting in settings for word in ("--set", setting)]
        figures["eval of 4 answers"] = seconds(["eval", "start", *few], cwd, 5)
        figures["dpo of 32 pairs, one direction"] = seconds([*train[1:], "--direction", "pos", "--force"], cwd, 5)
        planned = ["plan", "--card", "4090", "--recipe", "qwen3-8b"]
        figures["plan of qwen3-8b for a 4090"] = seconds(planned, cwd, 2)
        os.environ["LORA_ALIGN_CACHE"] = str(cwd / "cache")  # an empty cache, as on a first day
        os.environ["PATH"] = f"{Path(COMMAND).parent}{os.pathsep}{os.environ['PATH']}"  # for suggested commands
        start = time.perf_counter()
        story = subprocess.run([COMMAND, "demo"], cwd=cwd, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kilobytes on Linux
        figures["demo, once"] = {"seconds": round(time.perf_counter() - start), "peak GB": round(largest, 2)}
        every_pass = "from lora_align.model import nf4; nf4.SHARE = 0; from lora_align.cli import main; main()"
        start = time.perf_counter()
        again = [sys.executable, "-c", every_pass, "demo", "--runs", "again"]
        subprocess.run(again, cwd=cwd, check=True, capture_output=True)
        figures["demo, 4-bit weights dequantised in every pass"] = {"seconds": round(time.perf_counter() - start)}
        (RESULTS / "demo.txt").write_bytes(story.stdout)
        for picture in ("control", "map"):
            shutil.copyfile(cwd / "lora-align-demo" / f"{picture}.png", RESULTS / f"demo-{picture}.png")
    save("startup", figures)


if __name__ == "__main__":
    main()

"""Compare sft, dpo, merge and chat on a CUDA GPU with the CPU: a random Llama, float32 and the GPU's dtype."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from report import save

from lora_align import runs
from lora_align.adapters import peft_format
from support import make_base

COMMAND = str(Path(sys.executable).with_name("lora-align"))
PROMPT = ["chat", "--prompt", "Tell me about rain.", "--temperature", "0", "--max-new-tokens", "24", "--json"]


def settings(base: Path, dtype: str) -> list[str]:
    """Return the settings common to all training. An SFT adapter is the start policy, where dtypes may differ."""
    chosen = [f"base.model={base}", f"base.dtype={dtype}", "dpo.learning_rate=5e-4", "sft.limit=256"]
    chosen += ['sft.data="demo:conversations?rows=300"', "sft.learning_rate=1e-3", "sft.max_length=128"]
    return [word for value in chosen for word in ("--set", value)]


def train(base: Path, dtype: str, *more: str) -> list[str]:
    """Return the arguments of the training command."""
    return ["dpo", "--pref", "helpful", "--limit", "256", *settings(base, dtype), *more]


def run(folder: Path, words: Sequence[str], on_gpu: bool = True) -> str:
    """Run a command in a folder, on the GPU or with the GPU hidden."""
    began = time.perf_counter()
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **hidden}
    done = subprocess.run([COMMAND, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words}: {done.stderr}")
    print(f"{folder.name}: {words[0]} took {time.perf_counter() - began:.0f} s", flush=True)
    return done.stdout


def spine(folder: Path, base: Path, on_gpu: bool, dtype: str) -> dict[str, Any]:
    """Run sft, dpo, merge and chat."""
    folder.mkdir()
    run(folder, ["sft", *settings(base, dtype)], on_gpu)
    run(folder, train(base, dtype), on_gpu)
    run(folder, ["merge", "--weights", "helpful=1"], on_gpu)
    return {"answer": json.loads(run(folder, PROMPT, on_gpu))["answer"]}


def resumed(folder: Path, base: Path, dtype: str, whole: Path) -> dict[str, float]:
    """Kill training after a checkpoint in the middle, resume, and return the distance from an uninterrupted run.

    On a CPU the two are equal to the last bit. On a GPU, kernels may sum in another order.
    """
    folder.mkdir()
    shutil.copytree(whole / "runs" / "sft", folder / "runs" / "sft")
    words = train(base, dtype, "--direction", "pos", "--set", "dpo.save_minutes=0")
    child = subprocess.Popen([COMMAND, *words, "--quiet"], cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    unfinished = folder / "runs" / "dpo" / "helpful" / ".pos.unfinished"
    while child.poll() is None and not (unfinished / f"checkpoint-{KILLED}").exists():
        time.sleep(0.001)
    child.kill()
    child.wait()
    run(folder, [*words, "--resume"])
    ours, theirs = (of / "runs" / "dpo" / "helpful" / "pos" for of in (whole, folder))
    one, other = (peft_format.load(of) for of in (ours, theirs))
    losses = [
        [json.loads(line)["loss"] for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (ours, theirs)
    ]
    return {
        "resumed, ‖Δ − Δ whole‖ / ‖Δ whole‖": (other - one).norm() / one.norm(),
        "resumed, largest difference of a loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


KILLED = 8  # of 16 steps
NOUGHT = {"float32": 1e-3, "auto": 5e-2}


def compare(cpu: Path, gpu: Path) -> dict[str, float]:
    """Return first margins and the adapters' cosines to those of the CPU.

    First margins are 0 but for rounding, because references are computed in other batches.
    """
    figures = {}
    for side in ("pos", "neg"):
        ours, theirs = (folder / "runs" / "dpo" / "helpful" / side for folder in (cpu, gpu))
        figures[f"{side} first margin"] = runs.read(theirs).manifest.metrics["first_margin"]
        figures[f"{side} cosine to CPU"] = peft_format.load(ours).cosine(peft_format.load(theirs))
    return figures


def main() -> None:
    """Exit without a GPU; otherwise run, compare and save the figures."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA card here: nothing was checked")
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name(0)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "llama")
        cpu = spine(folder / "cpu", base, on_gpu=False, dtype="float32")
        for dtype in ("float32", "auto"):
            gpu = spine(folder / dtype, base, on_gpu=True, dtype=dtype)
            differences = compare(folder / "cpu", folder / dtype)
            figures[dtype] = {**differences, "same greedy answer": gpu["answer"] == cpu["answer"]}
            save("gpu_check", figures)  # what is known so far
            figures[dtype] |= resumed(folder / f"{dtype}, killed", base, dtype, folder / dtype)
            save("gpu_check", figures)
            if any(abs(differences[f"{side} first margin"]) > NOUGHT[dtype] for side in ("pos", "neg")):
                sys.exit(f"{dtype}: the first reward is not 0: {differences}")
            least = 0.99 if dtype == "float32" else 0.9
            if any(differences[f"{side} cosine to CPU"] < least for side in ("pos", "neg")):
                sys.exit(f"{dtype}: the card and the CPU train different adapters: {differences}")


if __name__ == "__main__":
    main()

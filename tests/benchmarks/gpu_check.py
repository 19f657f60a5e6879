"""The spine on a CUDA card beside the same spine on the CPU: a small random Llama, float32 and the card's own dtype."""

import json
import os
import subprocess
import sys
import tempfile
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


def spine(folder: Path, base: Path, on_gpu: bool, dtype: str) -> dict[str, Any]:
    """dpo, merge, chat in a folder, on the card or with the card hidden."""
    env = (
        dict(os.environ, HF_HUB_OFFLINE="1")
        if on_gpu
        else dict(os.environ, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    )
    chosen = ["--set", f"base.model={base}", "--set", f"base.dtype={dtype}"]
    folder.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run([COMMAND, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{words}: {done.stderr}")
        return done.stdout

    run("dpo", "--pref", "helpful", "--limit", "256", "--set", "dpo.learning_rate=5e-4", "--json", *chosen)
    run("merge", "--weights", "helpful=1")
    return {"answer": json.loads(run(*PROMPT))["answer"]}


NOUGHT = {"float32": 1e-3, "auto": 5e-2}


def compare(cpu: Path, gpu: Path) -> dict[str, float]:
    """First rewards, which are 0 but for rounding (references are computed in other batches); and how alike the trained
    adapters are."""
    figures = {}
    for side in ("pos", "neg"):
        ours, theirs = (folder / "runs" / "dpo" / "helpful" / side for folder in (cpu, gpu))
        figures[f"{side} first margin"] = runs.read(theirs).manifest.metrics["first_margin"]
        figures[f"{side} cosine to CPU"] = peft_format.load(ours).cosine(peft_format.load(theirs))
    return figures


def main() -> None:
    """Refuse without a card; otherwise run, compare, keep the figures."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA card here: nothing was checked")
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name(0)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "llama")
        cpu = spine(folder / "cpu", base, on_gpu=False, dtype="float32")
        for dtype in ("float32", "auto"):
            gpu = spine(folder / dtype, base, on_gpu=True, dtype=dtype)
            found = compare(folder / "cpu", folder / dtype)
            figures[dtype] = {**found, "same greedy answer": gpu["answer"] == cpu["answer"]}
            if any(abs(found[f"{side} first margin"]) > NOUGHT[dtype] for side in ("pos", "neg")):
                sys.exit(f"{dtype}: the first reward is not 0: {found}")
            least = 0.99 if dtype == "float32" else 0.9
            if any(found[f"{side} cosine to CPU"] < least for side in ("pos", "neg")):
                sys.exit(f"{dtype}: the card and the CPU train different adapters: {found}")
    save("gpu_check", figures)


if __name__ == "__main__":
    main()

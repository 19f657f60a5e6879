"""Measure a vLLM server that answers requests with mixes, beside requests for ordinary LoRA adapters.

    LORA_ALIGN_VLLM=FOLDER/bin/vllm python tests/benchmarks/vllm_mixes.py --work FOLDER

The environment of vLLM has lora-align, installed with --no-deps. The base is the demo base, in float32. The ordinary
adapters are mixes as well, merged and loaded before. An answer has 40 tokens. Requests of a new mix have to merge it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2 as httpx
from report import save

from lora_align.demo import BASE
from support import COMMAND, VLLM, vllm_server

MIXES, TOKENS, REQUESTS, CLIENTS, ROUNDS = 8, 40, 128, 16, 3


def align(work: Path, *words: str) -> None:
    """Run a command of lora-align in the work folder."""
    subprocess.run([COMMAND, *words, "--quiet"], cwd=work, check=True)


def ask(url: str, model: str) -> float:
    """Ask a model of the server for an answer of fixed length; return the seconds."""
    body = {"model": model, "prompt": "Tell me about rain.", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()
    return time.perf_counter() - began


def throughput(url: str, models: Sequence[str]) -> float:
    """Return tokens per second of requests from several clients, spread over models."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda number: ask(url, models[number % len(models)]), range(REQUESTS)))
    return REQUESTS * TOKENS / (time.perf_counter() - began)


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1000 * statistics.median(seconds), 1)


def main() -> None:
    """Measure and save every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    assert VLLM, "LORA_ALIGN_VLLM does not name a vllm command"
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "cache", ignore_errors=True)
    for preference in ("helpful", "harmless"):
        if not (work / "runs/dpo" / preference).exists():
            align(work, "dpo", "--pref", preference, "--limit", "200")
    mixes = [f"helpful={number + 1},harmless=-1" for number in range(MIXES)]
    plain = [f"plain{number}" for number in range(MIXES)]
    for name, weights in zip(plain, mixes, strict=True):
        align(work, "merge", "--weights", weights, "--fit", "vllm", "--out", name, "--force")
    settings = {"LORA_ALIGN_RUNS": str(work / "runs"), "LORA_ALIGN_CACHE": str(work / "cache")}
    with vllm_server(work, BASE, "--max-loras", str(MIXES), "--max-cpu-loras", str(4 * MIXES), **settings) as url:
        for name in plain:
            body = {"lora_name": name, "lora_path": str(work / name)}
            httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=300).raise_for_status()
        throughput(url, plain)  # warms up
        first = [ask(url, name) for name in mixes]
        later = [ask(url, name) for name in mixes]
        ordinary = [ask(url, name) for name in plain]
        rates = [(throughput(url, mixes), throughput(url, plain)) for _ in range(ROUNDS)]
    figures = {
        "vLLM": subprocess.run([VLLM, "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        "milliseconds of a request (median of 8)": {
            "a new mix": median_ms(first),
            "the same mix again": median_ms(later),
            "an ordinary adapter": median_ms(ordinary),
        },
        f"tokens per second of {CLIENTS} clients, {MIXES} mixes beside {MIXES} adapters": [
            [round(rate) for rate in pair] for pair in rates
        ],
        "throughput of mixes, of that of adapters (median)": round(statistics.median(a / b for a, b in rates), 3),
    }
    save("vllm_mixes", figures)


if __name__ == "__main__":
    main()

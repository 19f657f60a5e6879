"""Measure `export` with the shapes of Llama-3.1-8B and random weights: a merged model, and GGUF adapters.

    python tests/benchmarks/exporting.py --work FOLDER      (36 GB of disk)

A merged export is compared with a plain copy of the base that is synced as the export is. The base's hash is cached
before, as training would have done. Each figure comes from a process of its own: its time is without the imports, its
memory is the process's peak minus the peak after the imports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from algebra import LAYERS, SHAPE, SHAPES, VECTORS, adapter, peak
from report import save
from transformers import AutoTokenizer, LlamaConfig

from lora_align import recipe, store
from lora_align.adapters import safetensors_stream
from lora_align.console import Screen
from lora_align.demo import BASE
from lora_align.export import ExportOptions
from lora_align.export.exporters import EXPORTERS
from lora_align.export.source import find_source
from lora_align.policy.policy import find_policy

ROUNDS, VOCABULARY, LAYERS_A_FILE = 3, 128256, 8


def make_base(folder: Path) -> None:
    """Write a base in bfloat16 and several files. All matrices of one shape have the same random weights."""
    folder.mkdir(parents=True)
    LlamaConfig(num_hidden_layers=LAYERS, vocab_size=VOCABULARY, dtype="bfloat16", **SHAPE).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    wide = {"embed_tokens": (VOCABULARY, 4096)}
    made = {shape: (torch.randn(*shape) * 0.02).bfloat16() for shape in {*SHAPES.values(), *wide.values()}}
    layers = [
        {f"model.layers.{at}.{kind}.weight": made[shape] for kind, shape in SHAPES.items()} for at in range(LAYERS)
    ]
    ones = torch.ones(4096, dtype=torch.bfloat16)
    norms = ("input_layernorm", "post_attention_layernorm")
    ends = {"model.embed_tokens.weight": made[wide["embed_tokens"]], "lm_head.weight": made[wide["embed_tokens"]]}
    files: list[dict[str, Any]] = [{**ends, "model.norm.weight": ones}]
    for first in range(0, LAYERS, LAYERS_A_FILE):
        part = {name: tensor for layer in layers[first : first + LAYERS_A_FILE] for name, tensor in layer.items()}
        some = range(first, first + LAYERS_A_FILE)
        files.append(part | {f"model.layers.{at}.{norm}.weight": ones for at in some for norm in norms})
    index = {}
    for number, tensors in enumerate(files):
        name = f"model-{number}.safetensors"
        safetensors_stream.write(folder / name, tensors.items(), tensors)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def exported(work: Path, option: str) -> dict[str, float]:
    """Export once in this process, and delete the result."""
    settings = recipe.load(recipe.builtin()["demo"], [f"base.model={json.dumps(str(work / 'base'))}"])
    weights = ",".join(f"{work / name.replace(' ', '-')}={weight:g}" for name, weight in VECTORS.items())
    before, out = peak(), work / "out"
    began = time.perf_counter()
    policy = find_policy(weights, settings, work / "runs", Screen(quiet=True))
    source = find_source(policy, settings, work / "runs", Screen(quiet=True))
    found = time.perf_counter() - began
    made = EXPORTERS[option](source, out, Screen(quiet=True), ExportOptions(check=False))
    seconds = time.perf_counter() - began
    shutil.rmtree(out, ignore_errors=True)
    for file in (out, out.with_suffix(".md")):
        file.unlink(missing_ok=True)
    return {
        "seconds": seconds,
        "of it, to find the base": found,
        "MB": peak() - before,
        "bytes": sum(made.files.values()),
    }


def copied(work: Path) -> float:
    """Copy the base's weights, sync them, and return the seconds."""
    out = work / "copy"
    out.mkdir()
    began = time.perf_counter()
    for file in (work / "base").glob("*.safetensors"):
        shutil.copyfile(file, out / file.name)
    store.sync_tree(out)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def child(work: Path, option: str) -> dict[str, float]:
    """Export in a new process."""
    words = [sys.executable, __file__, "--work", str(work), f"--child={option}"]
    result: dict[str, float] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return result


def main() -> None:
    """Measure and save every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        print(json.dumps(exported(words.work, words.child)))
        return
    os.environ["LORA_ALIGN_CACHE"] = str(words.work / "cache")
    if not (words.work / "base").exists():
        make_base(words.work / "base")
    for seed, name in enumerate(VECTORS):
        if not (words.work / name.replace(" ", "-")).exists():
            adapter(words.work / name.replace(" ", "-"), seed, LAYERS)
    child(words.work, "--gguf")  # hashes the base
    rounds = [(copied(words.work), child(words.work, "--merged")) for _ in range(ROUNDS)]
    shares = sorted(plain / merged["seconds"] for plain, merged in rounds)
    save(
        "exporting",
        {
            "merged": [{"copy, seconds": round(plain, 1), **_rounded(merged)} for plain, merged in rounds],
            "speed of the merged export, of a plain copy's (median)": round(shares[len(shares) // 2], 3),
            "GGUF of the mix of four adapters": [_rounded(child(words.work, "--gguf")) for _ in range(ROUNDS)],
        },
    )


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in figures.items()}


if __name__ == "__main__":
    main()

"""Compare GGUF adapters with those of llama.cpp's own converter, for each type of base, with random weights.

    python tests/benchmarks/gguf_converter.py --llama-cpp FOLDER --llama-cpp-version TEXT --work FOLDER

--llama-cpp is llama.cpp's source; the package index has it inside llama-cpp-python's source (vendor/llama.cpp).
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from report import save
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora_align.adapters.peft_format import Adapter
from lora_align.export.gguf_adapter import ARCHITECTURES, About, Layout, write

SHAPE = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RANK, ALPHA = 8, 16


def products(file: Path, scale: float) -> Iterator[tuple[str, Any]]:
    """Yield the name and ΔW of each weight in a GGUF file."""
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in gguf.GGUFReader(file).tensors}
    for name in sorted(tensors):
        if name.endswith(".lora_a"):
            yield name, scale * (tensors[name[:-1] + "b"] @ tensors[name])


def compare(kind: str, work: Path, converter: Path) -> dict[str, Any]:
    """Convert one adapter both ways, and return the largest difference of ΔW as a share of its largest value."""
    base, adapter = work / kind, work / f"{kind}-adapter"
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE))
    model.save_pretrained(base)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, settings)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    policy.save_pretrained(adapter)
    ours, theirs = work / f"{kind}-ours.gguf", work / f"{kind}-theirs.gguf"
    write(ours, Adapter(adapter).items(), Layout.of(model.config), About(kind, "", kind, ""), "float32")
    words = [sys.executable, str(converter), "--base", str(base), "--outfile", str(theirs), str(adapter)]
    subprocess.run(words, check=True, capture_output=True)
    mine, other = dict(products(ours, 1.0)), dict(products(theirs, ALPHA / RANK))
    assert mine.keys() == other.keys()
    worst = max(float(np.abs(mine[name] - other[name]).max() / np.abs(other[name]).max()) for name in other)
    return {"weights": len(other), "largest difference": worst}


def main() -> None:
    """Compare every type of base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--llama-cpp-version", required=True, help="for the record")
    parser.add_argument("--work", type=Path, required=True)
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    converter = words.llama_cpp / "convert_lora_to_gguf.py"
    figures = {"gguf": version("gguf"), "llama.cpp": words.llama_cpp_version}
    save("gguf_converter", figures | {kind: compare(kind, words.work, converter) for kind in ARCHITECTURES})


if __name__ == "__main__":
    main()

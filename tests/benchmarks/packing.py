"""Compare a mix's logits with the dense sum's in stock PEFT on NF4, with bitsandbytes' CPU packing off and on."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from report import save
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_align import recipe
from lora_align.adapters import peft_format
from lora_align.commands import merge
from lora_align.console import Screen
from lora_align.demo import BASE as DEMO
from lora_align.model.nf4 import disable_cpu_repacking
from lora_align.policy.vectors import find
from lora_align.rankers import Direction
from lora_align.train import dpo

IDS = torch.arange(20, 84).view(2, 32)
WEIGHTS = {"helpful": 1.0, "brief": 0.5}


def stock() -> PreTrainedModel:
    """Load the demo base in NF4 as transformers does."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=settings, dtype=torch.float32)


def dense(runs_dir: Path) -> torch.Tensor:
    """Return logits of the base with every 4-bit weight dequantised and the sum of ΔW added."""
    quantised, twin = stock(), AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    layers = dict(twin.named_modules())
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            layers[name].weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    for preference, weight in WEIGHTS.items():
        for name, factors in find(preference, runs_dir).load().items():
            layers[name].weight.data += weight * (factors.B @ factors.A)
    return logits(twin)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of a fixed batch."""
    return model.eval()(IDS).logits


def main() -> None:
    """Train two small vectors, mix them, and compare three ways to run the mix."""
    project = recipe.load(recipe.builtin()["demo"], ["dpo.limit=256"])
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        for preference in WEIGHTS:
            dpo.train_dpo(project, [preference], list(Direction), runs_dir, Screen(quiet=True))
        made = merge.merge_adapters(WEIGHTS, project, runs_dir, Screen(quiet=True)).run
        expected = dense(runs_dir)
        plain = stock()
        disable_cpu_repacking(plain)
        off = logits(PeftModel.from_pretrained(plain, str(made.path)))
        on = logits(PeftModel.from_pretrained(stock(), str(made.path)))
        norm = peft_format.load(made.path).norm()
    save(
        "packing",
        {
            "mix norm": round(norm, 3),
            "logit scale (largest)": round(float(expected.abs().max()), 2),
            "packing off, largest difference": float((off - expected).abs().max()),
            "packing on, largest difference": float((on - expected).abs().max()),
        },
    )


if __name__ == "__main__":
    main()

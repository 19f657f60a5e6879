"""Compare the memory that `plan` predicts for a step with the memory it takes: peak bytes of tensors on this device.

On a CPU, torch's allocator reports them to its profiler; on a GPU, CUDA's allocator counts them. Weights and adapters
are subtracted from both sides: their bytes are exact and would hide errors of the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import save

CASES = [  # stage, base (layers and width; None: the demo base), overrides
    ("dpo", None, []),
    ("dpo", None, ["dpo.tokens_per_batch=1024"]),
    ("dpo", None, ["dpo.gradient_checkpointing=true"]),
    ("dpo", None, ["lora.rank=64"]),
    ("dpo", (8, 256), ["dpo.tokens_per_batch=2048"]),
    ("dpo", (8, 256), ["dpo.tokens_per_batch=2048", "dpo.gradient_checkpointing=true"]),
    ("dpo", (12, 512), ["dpo.tokens_per_batch=1024", "dpo.max_length=256"]),
    ("dpo", (12, 512), ["dpo.tokens_per_batch=1024", "dpo.max_length=256", "dpo.gradient_checkpointing=true"]),
    *((stage, size, []) for size in (None, (12, 512)) for stage in ("sft", "reward", "rsf")),
    *((stage, (12, 512), [f"{stage}.gradient_checkpointing=true"]) for stage in ("sft", "reward", "rsf")),
]


def base_of(size: tuple[int, int] | None, work: Path) -> str:
    """Return the demo base, or a random Llama of these layers and this width with the demo tokenizer."""
    if size is None:
        return "demo"
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_align.demo import BASE as DEMO

    layers, width = size
    folder = work / f"{layers}x{width}"
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def child(name: str, base: str, settings: list[str]) -> dict[str, float]:
    """Plan the largest part of a stage's step, then run it; return peak bytes beyond weights and adapters."""
    from lora_align import recipe
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.plan import planner
    from lora_align.plan.device import device_of
    from lora_align.plan.stages import stage_of
    from lora_align.plan.timing import time_step

    few = ["dpo.limit=200", "reward.limit=200", 'sft.data="demo:conversations?rows=200"']
    overrides = [f'base.model="{base}"', *few, *settings]
    project = recipe.load(recipe.builtin()["demo"], overrides)
    loaded = bases.find(project.base)
    stage = stage_of(project, name, loaded, Screen(quiet=True))
    planned = planner.estimate_stage(project, loaded, stage, device_of(project))
    measured = time_step(loaded, stage, [stage.job.rows[i] for i in planned.part]).taken
    planned_bytes = planned.cost.activations + planned.cost.logits
    return {
        "planned": round(planned_bytes / 1e6, 1),
        "taken": round(measured / 1e6, 1),
        "ratio": round(planned_bytes / measured, 3),
    }


def times() -> dict[str, Any]:
    """Compare the time that `plan --measure` predicts for one preference of the demo recipe with the time of `dpo`."""
    import tempfile

    os.environ["LORA_ALIGN_CACHE"] = tempfile.mkdtemp()  # no reference is cached
    from lora_align import recipe
    from lora_align.console import Screen
    from lora_align.plan import planner
    from lora_align.rankers import Direction
    from lora_align.train import dpo

    project, screen = recipe.load(recipe.builtin()["demo"], ["dpo.held_out=0"]), Screen(quiet=True)
    one = replace(project, preferences={"helpful": project.preferences["helpful"]})
    planned = planner.plan_stages(one, ["dpo"], screen, measure=True).as_json()["stages"][0]["seconds"]
    began = time.perf_counter()
    dpo.train_dpo(one, ["helpful"], list(Direction), Path(tempfile.mkdtemp()), screen)
    seconds = time.perf_counter() - began
    return {"planned": planned, "taken": round(seconds, 1), "ratio": round(planned / seconds, 3)}


def evening(work: Path) -> dict[str, Any]:
    """Plan one preference by the quick recipe on a 24 GB GPU, for a base of Llama 3.1's shape and full-length pairs.

    The pairs' own lengths and their tokenizer have no influence.
    """
    import shutil

    from transformers import LlamaConfig

    from lora_align import recipe
    from lora_align.console import Screen
    from lora_align.demo import BASE as DEMO
    from lora_align.plan import planner

    folder = work / "8b"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    plans: dict[str, Any] = {}
    for checkpointing in ("true", "false"):
        overrides = [f'base.model="{folder}"', f"dpo.gradient_checkpointing={checkpointing}"]
        project = recipe.load(recipe.builtin()["llama-3.1-8b"], overrides)
        one = {name: axis for name, axis in project.preferences.items() if name == "helpful"}
        of = planner.plan_stages(replace(project, preferences=one), ["dpo"], Screen(quiet=True), vram=24).as_json()[
            "stages"
        ][0]
        plans[f"checkpointing {checkpointing}"] = {name: of[name] for name in ("bytes", "total", "fits", "seconds")}
    return plans


def main() -> None:
    """Run each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("planning"))
    parser.add_argument("--child", nargs="*")
    options = parser.parse_args()
    if options.child:
        name, base, *settings = options.child
        print(json.dumps(child(name, base, settings)))
        return
    figures: list[dict[str, Any]] = []
    for stage, size, settings in CASES:
        words = [sys.executable, __file__, "--child", stage, base_of(size, options.work), *settings]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        base = f"{size[0]} layers of {size[1]}" if size else "the built-in base"
        figures.append(
            {"stage": stage, "base": base, "set": settings, "megabytes": json.loads(done.stdout.splitlines()[-1])}
        )
    furthest = max(abs(of["megabytes"]["ratio"] - 1) for of in figures)
    save(
        "planning",
        {
            "cases": figures,
            "furthest off": round(furthest, 3),
            "seconds, by a measured step": times(),
            "an evening": evening(options.work),
        },
    )


if __name__ == "__main__":
    main()

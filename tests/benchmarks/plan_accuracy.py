"""Compare the memory and time that `plan` predicts with those that training takes, on this device.

    python tests/benchmarks/plan_accuracy.py --work FOLDER [--base FILE.gguf --splits FOLDER]

Memory is the peak of tensors in the fullest part of a step. On a CPU, torch's allocator reports it to its profiler; on
a GPU, CUDA's allocator counts it. Weights and adapters are subtracted from both sides: their bytes are exact and would
hide errors of the rest. With --base, the recipe smollm2-135m is measured as well; splits.py writes the folder --splits.
The same command continues after a stop.
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

from report import once, save, stamp

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


REAL_STAGES = ("dpo", "reward", "rsf")


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
    """Compare the peak bytes of a stage of the demo recipe."""
    from lora_align import recipe

    few = ["dpo.limit=200", "reward.limit=200", 'sft.data="demo:conversations?rows=200"']
    return memory(recipe.load(recipe.builtin()["demo"], [f'base.model="{base}"', *few, *settings]), name)


def real_recipe(words: argparse.Namespace) -> Any:
    """Return the laptop recipe with few rows."""
    import real_base

    few: dict[str, Any] = {"dpo": {"limit": 48}, "reward": {"limit": 32}, "rsf": {"prompts": 8, "iterations": 1}}
    return real_base.project(words.base, words.splits, words.work / "runs", **few).recipe


def memory(project: Any, name: str) -> dict[str, float]:
    """Plan the largest part of a stage's step, then run it; return peak bytes beyond weights and adapters."""
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.plan import planner
    from lora_align.plan.device import device_of
    from lora_align.plan.stages import stage_of
    from lora_align.plan.timing import time_step

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


def real_time(name: str, words: argparse.Namespace) -> dict[str, Any]:
    """Compare the times that `plan` and `plan --measure` predict for a stage of the laptop recipe with its time.

    `dpo` trains both directions of `harmless`. `rsf` needs the reward model that the stage before has trained.
    """
    os.environ["LORA_ALIGN_CACHE"] = str(words.work / f"cache-{name}")
    import shutil

    from lora_align.console import Screen
    from lora_align.plan import planner
    from lora_align.rankers import Direction
    from lora_align.rsf.loop import train_rsf
    from lora_align.train import dpo, reward

    screen, runs, project = Screen(quiet=True), words.work / "runs", real_recipe(words)
    one = replace(project, preferences={"harmless": project.preferences["harmless"]})
    plain = planner.plan_stages(one, [name], screen).stages[0].estimate.seconds  # without sampling
    stage = planner.plan_stages(one, [name], screen, measure=True).stages[0]
    planned = stage.estimate.seconds + (stage.sampling_seconds or 0.0)
    shutil.rmtree(words.work / f"cache-{name}" / "references", ignore_errors=True)
    began = time.perf_counter()
    if name == "dpo":
        dpo.train_dpo(one, ["harmless"], list(Direction), runs, screen, force=True)
    elif name == "reward":
        reward.train_reward_model(one, runs, screen, force=True)
    else:
        train_rsf(one, runs, screen, force=True)
    seconds = time.perf_counter() - began
    figures = {"planned": round(planned, 1), "taken": round(seconds, 1), "ratio": round(planned / seconds, 3)}
    if stage.sampling_seconds is None:
        figures["ratio without --measure"] = round(plain / seconds, 3)
    return {"measured": stamp(), **figures}


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


def in_process(stage: str, size: tuple[int, int] | None, settings: list[str], options: argparse.Namespace) -> Any:
    """Compare the memory of a case in a process of its own."""
    words = ["--child", stage, base_of(size, options.work), *settings]
    base = f"{size[0]} layers of {size[1]}" if size else "the built-in base"
    return {"stage": stage, "base": base, "set": settings, "megabytes": called(options, *words)}


def called(options: argparse.Namespace, *words: str) -> Any:
    """Run this script in a process of its own, and return what it prints."""
    real = ["--base", options.base, "--splits", str(options.splits)] if options.base else []
    call = [sys.executable, __file__, "--work", str(options.work), *real, *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--real", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, base, *settings = options.child
        print(json.dumps(child(name, base, settings)))
        return
    if options.real:
        what, name = options.real
        print(json.dumps(memory(real_recipe(options), name) if what == "memory" else real_time(name, options)))
        return
    cases = [
        once(options.work, f"{stage} {size} {settings}", lambda case=case: in_process(*case, options))
        for case in CASES
        for stage, size, settings in [case]
    ]
    furthest = max(abs(of["megabytes"]["ratio"] - 1) for of in cases)
    save(
        "plan_accuracy",
        {
            "cases": cases,
            "furthest off": round(furthest, 3),
            "seconds, by a measured step": times(),
            "an evening": evening(options.work),
            "laptop recipe": {
                f"{what} of {stage}": once(
                    options.work, f"{what} of {stage}", lambda w=what, s=stage: called(options, "--real", w, s)
                )
                for what in ("memory", "time")
                for stage in (REAL_STAGES if options.base else ())
            },
        },
    )


if __name__ == "__main__":
    main()

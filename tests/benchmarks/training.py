"""Time DPO here and by TRL's trainer: both directions of two demo preferences, and one direction on a real base.

    python tests/benchmarks/training.py --work FOLDER [--base FILE.gguf --splits FOLDER]

Both sides use float32 on a CPU, the same base in NF4, the same tokens, LoRA, optimizer, batches and order. Gradient
checkpointing is off except for TRL's plain defaults. Each side is one process. Its time runs from the first load of
the base to the last adapter on disk, without imports. TRL trains the adapters one after the other and loads a base for
each. splits.py writes the folder --splits; the real pairs are train rows. The same command continues after a stop.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import splits
from report import once, save, stamp

BATCH = 8  # pairs in a step
SETTINGS = ["dpo.optimizer=adamw_torch", "dpo.learning_rate=1e-4", f"dpo.batch_size={BATCH}", "dpo.beta=0.1"]
SETTINGS += ["dpo.held_out=0", "dpo.epochs=1", "dpo.schedule=linear", "lora.rank=8", "lora.alpha=16"]
SETTINGS += ["dpo.warmup=0"]  # TRL's warm-up begins with a rate of 0, the one here with a larger one
SETTINGS += ['lora.targets=["all-linear"]']
SIDES = ("ours", "TRL, online reference", "TRL, precomputed", "TRL, plain defaults")


@dataclass(frozen=True)
class World:
    """Pairs, the preferences over them, and how often each side is timed."""

    pairs: int
    longest: int  # tokens
    ranks: dict[str, str]
    directions: Sequence[str] = ("pos", "neg")  # here, both share the reference
    sides: Sequence[str] = SIDES
    source: str = ""  # of a split; empty: the demo world
    micro: int = 4  # pairs that TRL computes at once


REAL = (("pos",), SIDES[:3])
WORLDS = {
    "hh, losses": World(24, 512, {"first": "label"}, ("pos",), SIDES[:2], "hh-harmless"),
    "hh": World(200, 512, {"first": "label"}, *REAL, "hh-harmless"),
    # with 4 pairs at once, TRL needed more than 24 GB of memory
    "ultrafeedback, losses": World(24, 1024, {"first": "label"}, ("pos",), SIDES[:2], "ultrafeedback", micro=2),
    "ultrafeedback": World(100, 1024, {"first": "label"}, *REAL, "ultrafeedback", micro=2),
    "demo": World(400, 512, {"first": "label:better_response_id", "second": "label:safer_response_id"}),
}


def recipe_of(name: str, words: argparse.Namespace) -> Any:
    """Load a recipe of one or two preferences over the same pairs."""
    from lora_align import recipe

    world = WORLDS[name]
    real = world.source and str(splits.file_of(words.splits, world.source, "train"))
    data = real or f"demo:pairs?rows={world.pairs}"
    overrides = [f"preferences.{of}.data={json.dumps(data)}" for of in world.ranks]
    overrides += [f'preferences.{of}.rank="{rank}"' for of, rank in world.ranks.items()]
    overrides += [f"base.model={json.dumps(words.base if real else 'demo')}"]
    overrides += [f"dpo.max_length={world.longest}", f"dpo.limit={world.pairs}", *SETTINGS]
    return recipe.load(recipe.builtin()["demo"], overrides)


def ours(world: str, words: argparse.Namespace) -> dict[str, Any]:
    """Train all adapters as `dpo` does with an empty cache. In the demo world, train the first's again, reseeded."""
    from dataclasses import replace

    from lora_align.console import Screen
    from lora_align.rankers import Direction
    from lora_align.train import dpo

    project, cache, runs = recipe_of(world, words), words.work / "cache", words.work / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    for rows in (cache / "tokens", cache / "references"):
        shutil.rmtree(rows, ignore_errors=True)
    os.environ["LORA_ALIGN_CACHE"] = str(cache)
    seconds, losses, pairs = [], {}, []
    again = [] if WORLDS[world].source else [("again", "first", 1)]
    directions = [Direction(name) for name in WORLDS[world].directions]
    for name, of, seed in (*((of, of, 0) for of in WORLDS[world].ranks), *again):
        began = time.perf_counter()
        this = replace(project, dpo=replace(project.dpo, seed=seed))
        made = dpo.train_dpo(this, [of], directions, runs, Screen(quiet=True), name=name)
        seconds.append(time.perf_counter() - began)
        pairs.append(made[0].manifest.data["rows"])
        for run in made if name != "again" else ():
            lines = (run.path / "metrics.jsonl").read_text().splitlines()
            losses[f"{name} {run.path.name}"] = [json.loads(line)["loss"] for line in lines]
    return {"seconds": sum(seconds[: len(WORLDS[world].ranks)]), "each": seconds, "pairs": pairs, "losses": losses}


def trl(world: str, words: argparse.Namespace, how: str) -> dict[str, Any]:
    """Train the same adapters by TRL's trainer."""
    import torch
    from beside_trl import columns, tokenised
    from datasets import Dataset
    from trl import DPOConfig

    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.rankers import Direction
    from lora_align.train import dpo, lora_trainer

    project, losses, pairs = recipe_of(world, words), {}, {}
    os.environ["LORA_ALIGN_CACHE"] = str(words.work / "cache")
    base = bases.find(project.base)
    began = time.perf_counter()
    for name in WORLDS[world].ranks:
        material = dpo.prepare(project, name, base, Screen(quiet=True))
        for direction in map(Direction, WORLDS[world].directions):
            rows = [row.for_direction(direction) for row in material.train]
            plain = how == "TRL, plain defaults"
            out = words.work / "trl"
            shutil.rmtree(out, ignore_errors=True)
            trainer = tokenised()(
                model=base.load(),
                args=DPOConfig(
                    output_dir=str(out),
                    beta=project.dpo.beta,
                    num_train_epochs=1,
                    learning_rate=project.dpo.learning_rate,
                    lr_scheduler_type="linear",
                    warmup_steps=project.dpo.warmup,
                    optim="adamw_torch",
                    per_device_train_batch_size=WORLDS[world].micro,
                    gradient_accumulation_steps=BATCH // WORLDS[world].micro,
                    max_length=project.dpo.max_length,
                    precompute_ref_log_probs=how == "TRL, precomputed",
                    seed=project.dpo.seed,
                    use_cpu=True,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    **({} if plain else {"bf16": False, "gradient_checkpointing": False}),
                ),
                train_dataset=Dataset.from_list(columns(rows)),
                processing_class=base.chat.tokenizer,
                peft_config=lora_trainer.adapter_config(project.lora, base),
            )
            if not plain:
                lora_trainer.initialise(trainer.model, project.lora.init_seed)
            trainer.train()
            trainer.model.save_pretrained(str(out / "adapter"))
            losses[f"{name} {direction.value}"] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
            pairs[f"{name} {direction.value}"] = len(rows)
            del trainer
    torch.set_grad_enabled(True)
    return {"seconds": time.perf_counter() - began, "losses": losses, "pairs": pairs}


def child(world: str, side: str, words: argparse.Namespace) -> Any:
    """Run one side in a process of its own."""
    call = [sys.executable, __file__, "--work", str(words.work), "--child", world, side]
    if words.base:
        call += ["--base", words.base, "--splits", str(words.splits)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compared(name: str, words: argparse.Namespace) -> dict[str, Any]:
    """Run all sides; return each side's time, and those of a second preference and a new seed."""
    results = {
        side: once(words.work, f"{name}, {side}", lambda side=side: child(name, side, words))
        for side in WORLDS[name].sides
    }
    mine = results["ours"]
    each = [seconds / count for seconds, count in zip(mine["each"], mine["pairs"], strict=True)]
    figures: dict[str, Any] = {
        "measured": stamp(),
        **{
            side: {"seconds": round(result["seconds"], 1), "ours of it": round(mine["seconds"] / result["seconds"], 3)}
            for side, result in results.items()
        },
        "pairs of each preference": mine["pairs"][: len(WORLDS[name].ranks)],
        "largest difference of losses": apart(mine, results["TRL, online reference"]),
    }
    if not WORLDS[name].source:
        figures["the first with another seed, of the first"] = round(mine["each"][-1] / mine["each"][0], 3)
        figures["a second preference over the same rows, of the first, a pair"] = round(each[1] / each[0], 3)
    return figures


def apart(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Return the largest differences between the loss curves of this project and of TRL with an online reference.

    The last step has fewer pairs and is counted apart: there TRL weighs a smaller part like a whole one.
    """
    distances = {"full steps": 0.0, "a last step of fewer pairs": 0.0}
    for name, losses in theirs["losses"].items():
        whole = theirs["pairs"][name] // BATCH
        for step, (one, other) in enumerate(zip(mine["losses"][name], losses, strict=True)):
            kind = "full steps" if step < whole else "a last step of fewer pairs"
            distances[kind] = max(distances[kind], abs(one - other))
    return distances


def main() -> None:
    """Measure and save every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        world, side = words.child
        print(json.dumps(ours(world, words) if side == "ours" else trl(world, words, side)))
        return
    words.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name, world in WORLDS.items():
        if words.base or not world.source:
            figures[name] = once(words.work, name, lambda name=name: compared(name, words))
            save("training", figures)  # what is measured so far


if __name__ == "__main__":
    main()

"""Time DPO here and by TRL's trainer: two preferences in both directions over the same pairs.

Both sides use float32 on a CPU, the same tokens, LoRA, optimizer, batches and order. Gradient checkpointing is off
except for TRL's plain defaults. Each side is one process. Its time runs from the first load of the base to the last
adapter on disk, without imports. TRL trains the four adapters one after the other and loads a base for each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from report import once, save

ROUNDS = {"demo": 2, "real": 1}
REAL_ROWS, DEMO_ROWS = 24, 400
VOCABULARY = 4096  # vocabulary of the base for real pairs
BATCH, MICRO = 8, 4  # pairs in a step, and pairs that TRL computes at once
SETTINGS = ["dpo.optimizer=adamw_torch", "dpo.learning_rate=1e-4", f"dpo.batch_size={BATCH}", "dpo.beta=0.1"]
SETTINGS += ["dpo.held_out=0", "dpo.epochs=1", "dpo.schedule=linear", "lora.rank=8", "lora.alpha=16"]
SETTINGS += ['lora.targets=["all-linear"]']
SIDES = ("ours", "TRL, online reference", "TRL, precomputed", "TRL, plain defaults")


def recipe_of(world: str, work: Path) -> Any:
    """Load a recipe of two preferences over the same pairs, on the demo base or on a base made for real pairs."""
    from lora_align import recipe

    if world == "demo":
        ranks, base = ("label:better_response_id", "label:safer_response_id"), "demo"
        data, longest, limit = f"demo:pairs?rows={DEMO_ROWS}", 512, DEMO_ROWS
    else:
        data = str(Path(os.environ["LORA_ALIGN_REAL_DATA"]) / "llama-factory" / "dpo_en_demo.json")
        ranks, base, longest, limit = ("label", "shorter"), str(real_base(work)), 1024, REAL_ROWS
    overrides = [f'preferences.{name}.data="{data}"' for name in ("first", "second")]
    overrides += [f'preferences.{name}.rank="{rank}"' for name, rank in zip(("first", "second"), ranks, strict=True)]
    overrides += [f'base.model="{base}"', f"dpo.max_length={longest}", f"dpo.limit={limit}", *SETTINGS]
    return recipe.load(recipe.builtin()["demo"], overrides)


def real_base(work: Path) -> Path:
    """Make a random Llama of 8 M parameters with a vocabulary from the same conversations, in Qwen 2.5's form.

    An eighth of its matrices belongs to the vocabulary, as in bases of some billions of parameters. With such a base's
    vocabulary, so small a base would mostly compute logits.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, data = work / "base", Path(os.environ["LORA_ALIGN_REAL_DATA"])
    if not (folder / "config.json").exists():
        rows = json.loads((data / "llama-factory" / "dpo_en_demo.json").read_text())
        texts = [text["value"] for row in rows for text in (*row["conversations"], row["chosen"], row["rejected"])]
        theirs = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2.5")
        tokenizer = theirs.train_new_from_iterator(texts, VOCABULARY)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def ours(world: str, work: Path) -> dict[str, Any]:
    """Train all four adapters as `dpo` does with an empty cache; then train them again with another seed."""
    from dataclasses import replace

    from lora_align.console import Screen
    from lora_align.rankers import Direction
    from lora_align.train import dpo

    project, cache, runs = recipe_of(world, work), work / "cache", work / "runs"
    for folder in (cache, runs):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ["LORA_ALIGN_CACHE"] = str(cache)
    seconds, losses, pairs = [], {}, []
    for name, seed in (("first", 0), ("second", 0), ("again", 1)):
        began = time.perf_counter()
        this = replace(project, dpo=replace(project.dpo, seed=seed))
        of = "first" if name == "again" else name
        made = dpo.train_dpo(this, [of], list(Direction), runs, Screen(quiet=True), name=name)
        seconds.append(time.perf_counter() - began)
        pairs.append(made[0].manifest.data["rows"])
        for run in made if name != "again" else ():
            lines = (run.path / "metrics.jsonl").read_text().splitlines()
            losses[f"{name} {run.path.name}"] = [json.loads(line)["loss"] for line in lines]
    return {
        "seconds": seconds[0] + seconds[1],
        "first": seconds[0],
        "second": seconds[1],
        "again": seconds[2],
        "pairs": pairs,
        "losses": losses,
    }


def trl(world: str, work: Path, how: str) -> dict[str, Any]:
    """Train the same four adapters by TRL's trainer."""
    import torch
    from beside_trl import columns, tokenised
    from datasets import Dataset
    from trl import DPOConfig

    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.rankers import Direction
    from lora_align.train import dpo, lora_trainer

    project, losses, pairs = recipe_of(world, work), {}, {}
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    base = bases.find(project.base)
    began = time.perf_counter()
    for name in ("first", "second"):
        material = dpo.prepare(project, name, base, Screen(quiet=True))
        for direction in Direction:
            rows = [row.for_direction(direction) for row in material.train]
            plain = how == "TRL, plain defaults"
            out = work / "trl"
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
                    per_device_train_batch_size=MICRO,
                    gradient_accumulation_steps=BATCH // MICRO,
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
                peft_config=lora_trainer.fresh_adapter(project.lora, base),
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


CHILDREN: dict[str, Callable[..., Any]] = {
    "ours": lambda world, work: ours(world, Path(work)),
    "trl": lambda world, work, how: trl(world, Path(work), how),
}


def child(what: str, *words: str) -> Any:
    """Run one of the sides above in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compared(world: str, work: Path) -> dict[str, Any]:
    """Run all sides in turns; return each side's quickest time, and those of a second preference and a new seed."""
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS[world]):
        for side in SIDES:
            result = child("ours", world, str(work)) if side == "ours" else child("trl", world, str(work), side)
            rounds[side].append(result)
    best = {side: min(results, key=lambda one: one["seconds"]) for side, results in rounds.items()}
    mine = best["ours"]
    figures: dict[str, Any] = {
        side: {"seconds": round(result["seconds"], 1), "ours of it": round(mine["seconds"] / result["seconds"], 3)}
        for side, result in best.items()
    }
    each = [mine[name] / count for name, count in zip(("first", "second", "again"), mine["pairs"], strict=True)]
    figures["pairs of the first preference, and of the second"] = mine["pairs"][:2]
    figures["a second preference over the same rows, of the first, a pair"] = round(each[1] / each[0], 3)
    figures["the first with another seed, of the first"] = round(mine["again"] / mine["first"], 3)
    return figures


def apart(world: str, work: Path) -> dict[str, float]:
    """Return the largest differences between the loss curves, for TRL with an online reference.

    The last step has fewer pairs and is counted apart: there TRL weighs a part of 1 pair like a part of 4.
    """
    mine = child("ours", world, str(work))["losses"]
    theirs = child("trl", world, str(work), SIDES[1])
    distances = {"full steps": 0.0, "a last step of fewer pairs": 0.0}
    for name, losses in theirs["losses"].items():
        whole = theirs["pairs"][name] // BATCH
        for step, (one, other) in enumerate(zip(mine[name], losses, strict=True)):
            kind = "full steps" if step < whole else "a last step of fewer pairs"
            distances[kind] = max(distances[kind], abs(one - other))
    return distances


def main() -> None:
    """Measure and save every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training"))
    parser.add_argument("child", nargs="*")
    options = parser.parse_args()
    if options.child:
        what, *words = options.child
        print(json.dumps(CHILDREN[what](*words)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    worlds = ["demo", *(["real"] if os.environ.get("LORA_ALIGN_REAL_DATA") else [])]
    save(
        "training",
        {
            **{world: once(options.work, world, lambda world=world: compared(world, options.work)) for world in worlds},
            "largest difference of losses": {
                world: once(options.work, f"{world} losses", lambda world=world: apart(world, options.work))
                for world in worlds
            },
        },
    )


if __name__ == "__main__":
    main()

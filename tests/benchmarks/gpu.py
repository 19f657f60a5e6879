"""Measure DPO, SFT, sampling and chat on 4-bit bases of 8 B and of 135 M parameters within 24 GB of GPU memory.

    python tests/benchmarks/gpu.py --work FOLDER [--minutes N]

TRL's trainers run beside ours, and unsloth where it is installed. The bases have the shapes of Llama 3.1 8B and of
SmolLM2-135M, and random weights, which this script writes: speed and memory do not depend on the weights' values. Every
measurement is a process of its own that may use 24 GB, and prints its figures at once. The most important ones come
first; with `--minutes`, those that do not fit are named and left out. The same command continues after a
stop. `--small` tries the script on any machine with tiny bases; its figures are not saved.

Not yet run on a GPU.
"""

import argparse
import importlib.util
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

CAP = 24e9  # bytes of GPU memory for a process
SHAPES = {
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONTEXT = 8192
PAIRS, TEXTS, PROMPTS, ANSWERS, ANSWER = 64, 32, 16, 16, 128
LENGTH = 512  # tokens of a sequence, a quarter of them the prompt; a pair has twice as many
SWITCHES = {  # settings of ours, each measured beside the recipe's defaults
    "no checkpointing": ["gradient_checkpointing=false"],
    "parts of 2,048 tokens": ["tokens_per_batch=2048"],
    "parts of 8,192 tokens": ["tokens_per_batch=8192"],
    "8-bit Adam": ["optimizer=adamw_8bit"],
    "compiled": ["compile=true"],
    "eager attention": ["base.attention=eager"],
    "flash attention": ["base.attention=flash_attention_2"],
}
Measurement = tuple[str, str, tuple[Any, ...]]  # shape, name, and the arguments of `child`
FIRST: list[Measurement] = [
    *(
        measurement
        for shape in SHAPES
        for measurement in (
            (shape, "dpo", ("our dpo", LENGTH, [])),
            (shape, "dpo, TRL's plain defaults", ("their dpo", LENGTH, "plain defaults")),
            (shape, "sampling", ("sampling", LENGTH, "ours")),
            (shape, "sampling, generate", ("sampling", LENGTH, "generate")),
            (shape, "chat with live weights", ("chat", LENGTH)),
            (shape, "dpo, TRL with precomputed references", ("their dpo", LENGTH, "precomputed")),
            (shape, "sft", ("our sft", LENGTH, [])),
            (shape, "sft, TRL", ("their sft", LENGTH)),
        )
    ),
]
LATER: list[Measurement] = [
    *(("8B", f"dpo, {name}", ("our dpo", LENGTH, settings)) for name, settings in SWITCHES.items()),
    ("8B", "dpo, unsloth", ("their dpo", LENGTH, "unsloth")),
    ("8B", "dpo of 1,024 tokens", ("our dpo", 1024, [])),
    ("8B", "sft of 2,048 tokens", ("our sft", 2048, [])),
]


def write_base(folder: Path, shape: dict[str, Any]) -> None:
    """Write 16-bit weights, one file a layer. The first load quantises them to 4 bits, as for any base."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lora_align.demo import BASE as DEMO

    if (folder / "model.safetensors.index.json").exists():
        return
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    config = LlamaConfig(
        **shape,
        max_position_embeddings=CONTEXT,
        architectures=["LlamaForCausalLM"],
        eos_token_id=1,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, names in files.items():
        tensors = {}
        for name, shape in names.items():
            made = torch.randn(shape, device=where) * 0.02 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = made.to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def project_of(work: Path, stage: str, length: int, settings: list[str]) -> Any:
    """Load the quick recipe for such a base and rows of one length."""
    from lora_align import recipe

    overrides = [f'base.model="{work / "base"}"', f"dpo.max_length={length}"]
    overrides += ['sft.data="rows made here"', f"sft.max_length={length}", "sft.packing=false"]
    overrides += [f"{stage}.{setting}" if "base." not in setting else setting for setting in settings]
    return recipe.load(recipe.builtin()["llama-3.1-8b"], overrides)


def pairs(length: int, vocabulary: int) -> list[Any]:
    """Return pairs of random tokens, in which both answers fill the sequence."""
    import random

    from lora_align.model.tokenise import TokenPair

    draw = random.Random(0)

    def some(count: int) -> list[int]:
        return [draw.randrange(4, vocabulary) for _ in range(count)]

    return [TokenPair(some(length // 4), some(3 * length // 4), some(3 * length // 4)) for _ in range(PAIRS)]


class Meter:
    """Measure the seconds and the peak bytes of the block inside."""

    def __enter__(self) -> "Meter":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        self.peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0

    def figures(self, tokens: int) -> dict[str, float]:
        """Return the figures for this many tokens."""
        return {
            "seconds": round(self.seconds, 3),
            "tokens a second": round(tokens / self.seconds),
            "peak GB": round(self.peak / 1e9, 2),
        }


FORWARD, LEARNING, ANEW = 2, 4, 6  # FLOP a weight and token: forward, with backward, with recomputed activations


def share(base: Any, project: Any, each: int, tokens: int, seconds: float) -> dict[str, float]:
    """Return the share of the device's measured matrix rate, at `each` operations for a weight and token."""
    from transformers import AutoConfig

    from lora_align.plan.device import device_of

    config = AutoConfig.from_pretrained(base.folder)
    head = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size**2 * 2 + config.hidden_size * head * config.num_key_value_heads * 2
    weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    weights += config.vocab_size * config.hidden_size
    return {"of the matrix rate": round(each * weights * tokens / seconds / device_of(project).rate, 3)}


def our_dpo(work: Path, length: int, settings: list[str]) -> dict[str, Any]:
    """Compute references, then train one direction twice and time the second: kernels compile during the first."""
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.train import dpo, lora_trainer
    from lora_align.train.checkpoints import Checkpoints
    from lora_align.train.job import Target
    from lora_align.train.reference_cache import ReferenceCache
    from lora_align.train.token_rows import TokenRows

    project = project_of(work, "dpo", length, settings)
    screen, base = Screen(quiet=True), bases.find(project.base)
    model = base.load()
    material = TokenRows(pairs(length, model.config.vocab_size), [], {})
    folder = work / "dpo"
    shutil.rmtree(folder, ignore_errors=True)
    tokens = 2 * length * PAIRS
    known = ReferenceCache(folder / "references.sqlite")
    with Meter() as reading:
        ready = dpo.with_references(material, known, model, 2 * project.dpo.tokens_per_batch, "references", screen)
    for _ in range(2):
        staging = folder / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        unfinished = Checkpoints(folder / "unfinished", {}, restart=True)
        with Meter() as training:
            job = dpo.dpo_job(project.dpo, project.lora, ready.train, base)
            trained = lora_trainer.train(job, model, Target(folder, "pos", screen), unfinished, staging)
        model = lora_trainer.unwrap(trained.policy)
    each = ANEW if project.dpo.gradient_checkpointing else LEARNING
    return {
        "references": reading.figures(tokens) | share(base, project, FORWARD, tokens, reading.seconds),
        "direction": training.figures(tokens) | share(base, project, each, tokens, training.seconds),
        "steps": trained.steps,
    }


def theirs(work: Path, length: int, batch: int) -> dict[str, Any]:
    """Return the arguments of TRL's trainers; all others keep their defaults."""
    import torch

    return {
        "output_dir": str(work / "trl"),
        "max_length": length,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": batch // 2,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def their_dpo(work: Path, length: int, how: str) -> dict[str, Any]:
    """Train one adapter by TRL's trainer on the same tokens, at its plain defaults or with precomputed references.

    The time includes building the trainer, as ours does, because TRL computes its references there.
    """
    if how == "unsloth":
        import unsloth  # noqa: F401 - imported before the libraries that it patches

    from beside_trl import columns, tokenised
    from datasets import Dataset
    from transformers import AutoConfig
    from trl import DPOConfig

    from lora_align.model import base as bases
    from lora_align.train import lora_trainer

    project = project_of(work, "dpo", length, [])
    base = bases.find(project.base)
    rows = pairs(length, AutoConfig.from_pretrained(base.folder).vocab_size)
    settings: dict[str, Any] = {"precompute_ref_log_probs": True} if how == "precomputed" else {}
    adapter = lora_trainer.adapter_config(project.lora, base)
    if how != "unsloth":
        model = base.load()
    else:
        from unsloth import FastLanguageModel, PatchDPOTrainer

        PatchDPOTrainer()
        model, _ = FastLanguageModel.from_pretrained(str(base.folder), max_seq_length=length, load_in_4bit=True)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = FastLanguageModel.get_peft_model(
            model, r=project.lora.rank, lora_alpha=project.lora.alpha, target_modules=targets, lora_dropout=0
        )
        adapter = None
    args = DPOConfig(**theirs(work, length, project.dpo.batch_size), **settings)
    with Meter() as meter:
        tokenised()(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(columns(rows)),
            processing_class=base.chat.tokenizer,
            peft_config=adapter,
        ).train()
    tokens, each = 2 * length * PAIRS, FORWARD + (ANEW if args.gradient_checkpointing else LEARNING)  # references first
    return meter.figures(tokens) | share(base, project, each, tokens, meter.seconds)


def our_sft(work: Path, length: int, settings: list[str]) -> dict[str, Any]:
    """Train SFT on every token of every text."""
    from lora_align.console import Screen
    from lora_align.model import base as bases
    from lora_align.model.tokenise import TokenText
    from lora_align.train import lora_trainer, sft
    from lora_align.train.checkpoints import Checkpoints
    from lora_align.train.job import Target

    project = project_of(work, "sft", length, settings)
    base = bases.find(project.base)
    model = base.load()
    texts = [[*row.prompt, *row.chosen] for row in pairs(length, model.config.vocab_size)[:TEXTS]]
    job = sft.sft_job(project.sft, project.lora, [TokenText(ids, ids) for ids in texts], base)
    folder = work / "sft"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    unfinished = Checkpoints(folder / "unfinished", {})
    with Meter() as meter:
        lora_trainer.train(job, model, Target(folder, "sft", Screen(quiet=True)), unfinished, folder)
    tokens, each = length * TEXTS, ANEW if project.sft.gradient_checkpointing else LEARNING
    return meter.figures(tokens) | share(base, project, each, tokens, meter.seconds)


def their_sft(work: Path, length: int) -> dict[str, Any]:
    """Train on the same texts by TRL's trainer, at its defaults."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lora_align.model import base as bases
    from lora_align.train import lora_trainer

    project = project_of(work, "sft", length, [])
    base = bases.find(project.base)
    model = base.load()
    texts = [[*row.prompt, *row.chosen] for row in pairs(length, model.config.vocab_size)[:TEXTS]]
    args = SFTConfig(**theirs(work, length, project.sft.batch_size))
    with Meter() as meter:
        SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": texts}),
            processing_class=base.chat.tokenizer,
            peft_config=lora_trainer.adapter_config(project.lora, base),
        ).train()
    tokens, each = length * TEXTS, ANEW if args.gradient_checkpointing else LEARNING
    return meter.figures(tokens) | share(base, project, each, tokens, meter.seconds)


def sampling(work: Path, length: int, whose: str) -> dict[str, Any]:
    """Sample answers for all prompts in one batch, with this project's sampling or with `generate`."""
    import torch

    from lora_align.model import base as bases
    from lora_align.model.batch_sampling import sample
    from lora_align.model.sampler_protocol import Sampling

    project = project_of(work, "dpo", length, [])
    base = bases.find(project.base)
    model = base.load()
    prompts = [row.prompt for row in pairs(length, model.config.vocab_size)[:PROMPTS]]
    tokens = 0
    with Meter() as meter, torch.inference_mode():
        if whose == "ours":
            how = Sampling(1.0, 1.0, ANSWER, 0)
            tokens = sum(len(a.tokens) for batch in sample(model, base, prompts, ANSWERS, how) for a in batch)
        else:
            ids = torch.tensor(prompts, device=model.device)
            generated = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=ANSWER,
                num_return_sequences=ANSWERS, pad_token_id=0,
            )  # fmt: skip
            tokens = generated[:, ids.shape[1] :].numel()
    return meter.figures(tokens) | share(base, project, FORWARD, tokens, meter.seconds)


def random_update(model: Any, rank: int) -> Any:
    """Return a small random update of every linear layer except the output layer."""
    import torch
    from torch import nn

    from lora_align.adapters.delta import Factors, LoraDelta

    return LoraDelta.of(
        {
            name: Factors(1e-4 * torch.randn(layer.out_features, rank), torch.randn(rank, layer.in_features))
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings()
        }
    )


def chat(work: Path, length: int) -> dict[str, Any]:
    """Decode one answer through two vectors whose weights may change, and time a change of the weights."""
    import torch
    from transformers import AutoConfig

    from lora_align.model import base as bases
    from lora_align.model.batch_sampling import sample
    from lora_align.model.mixer import Mixer
    from lora_align.model.sampler_protocol import Sampling

    project = project_of(work, "dpo", length, [])
    base = bases.find(project.base)
    model = base.load()
    mixer = Mixer(model, {name: random_update(model, 2 * project.lora.rank) for name in ("one", "other")}, {})
    [prompt] = [row.prompt for row in pairs(length, AutoConfig.from_pretrained(base.folder).vocab_size)[:1]]
    how = Sampling(1.0, 1.0, ANSWER, 0)
    figures: dict[str, Any] = {}
    for name, weights in (("without vectors", {}), ("with two vectors", {"one": 1.0, "other": -0.5})):
        with Meter() as changing:
            mixer.set(weights)
        with Meter() as meter, torch.inference_mode():
            tokens = sum(len(a.tokens) for batch in sample(model, base, [prompt], 1, how) for a in batch)
        figures[name] = meter.figures(tokens) | {"milliseconds to change the weights": round(1e3 * changing.seconds, 2)}
    return figures


CHILDREN: dict[str, Callable[..., Any]] = {
    "write": lambda work, shape: write_base(work / "base", shape),
    "our dpo": our_dpo,
    "their dpo": their_dpo,
    "our sft": our_sft,
    "their sft": their_sft,
    "sampling": sampling,
    "chat": chat,
}


def child(work: Path, timeout: float | None, what: str, *args: Any) -> Any:
    """Run one measurement in a process of its own.

    A failure's message is a result, too, as when memory runs out.
    """
    words = [sys.executable, __file__, "--work", str(work), "--child", json.dumps([what, *args])]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["without a word"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def run_child(work: Path, what: str, *args: Any) -> None:
    """Run one measurement within 24 GB of GPU memory."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    print(json.dumps(CHILDREN[what](work, *args)))


def main() -> None:
    """Run every measurement that this machine has a device and the time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work.resolve()
    if options.child:
        run_child(work, *json.loads(options.child))
        return
    import torch

    if not torch.cuda.is_available() and not options.small:
        sys.exit("no CUDA card here: nothing was measured (--small tries the script out)")
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"}
    left: list[str] = []
    unsloth = importlib.util.find_spec("unsloth")
    for shape, name, args in [*FIRST, *LATER]:
        if args[-1] == "unsloth" and not unsloth:
            continue
        label, folder = f"{shape}, {name}", work / shape
        try:
            if not (folder / "base" / "model.safetensors.index.json").exists():
                (folder / "base").mkdir(parents=True, exist_ok=True)
                written = child(folder, remaining(end), "write", SMALL if options.small else SHAPES[shape])
                assert not written, written
            figures[label] = once(work, label, lambda f=folder, a=args: child(f, remaining(end), *a))
            if "failed" in figures[label]:
                (work / "measured" / f"{label}.json").unlink()  # so that the same command tries it again
        except subprocess.TimeoutExpired:
            left.append(label)
            continue
        print(f"{label}: {json.dumps(figures[label])}", flush=True)
        if not options.small:
            save("gpu", figures)  # what is measured so far
    if left:
        figures["left out"] = left
        print(f"no time was left for: {'; '.join(left)}")
    if not options.small:
        save("gpu", figures)


def remaining(end: float | None) -> float | None:
    """Return the seconds that a process may take; raise TimeoutExpired if none are left."""
    if end is None:
        return None
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise subprocess.TimeoutExpired("gpu.py", 0)
    return seconds


if __name__ == "__main__":
    main()

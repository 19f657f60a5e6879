"""Measure the time, the memory and the growth of adding adapters with the shapes of Llama-3.1-8B.

Each figure comes from a process of its own. A merge's time runs from four adapter folders to a published, synced
folder, without the imports. Its memory is the process's peak minus the memory after the imports. Each merge is compared
with PEFT and with the machine's limits. The floor is the time to read the adapters and to write as many bytes as their
sum has.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from report import once, save
from torch import nn

from lora_align import recipe
from lora_align.adapters import merge_options, peft_format
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.adapters.peft_config import BaseInfo
from lora_align.commands import merge
from lora_align.console import Screen
from lora_align.data.rows import Message
from lora_align.model.mixer import Mixer

RANK, LAYERS, ROUNDS = 16, 32, 3
SHAPES = {  # shapes of one layer, [out, in]
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SPOKEN_RANKS = (0, 4, 16, 64)
PARENTS = (2, 4, 8, 16, 32, 64)
GROWTH_LAYERS = 4
VECTORS = {"helpful pos": 1.0, "helpful neg": -1.0, "harmless pos": 0.5, "harmless neg": -0.5}


def adapter(folder: Path, seed: int, layers: int) -> Path:
    """Write a synthetic LoRA adapter of those shapes in bfloat16."""
    draw = torch.Generator().manual_seed(seed)

    def modules() -> Any:
        for layer in range(layers):
            for kind, (out, into) in SHAPES.items():
                B, A = (torch.randn(*shape, generator=draw) * 0.01 for shape in ((out, RANK), (RANK, into)))
                yield f"model.layers.{layer}.{kind}", Factors(B, A)

    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in SHAPES]
    about = BaseInfo("8b", targets=tuple(kind.rpartition(".")[2] for kind in SHAPES))
    peft_format.save(folder, modules(), names, about, torch.bfloat16)
    return folder


def peak() -> float:
    """Return this process's peak memory in MB. (`ru_maxrss` would include the parent's peak.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


# --- measurements, each in a process of its own ---


def merged(work: Path, weights: dict[str, float], how: list[Any]) -> dict[str, float]:
    """Return the seconds and the memory of one merge."""
    before, began = peak(), time.perf_counter()
    plan = merge_options.MergeOptions.parse(*how)
    merge.merge_adapters(
        weights, recipe.load(recipe.builtin()["demo"]), work / "runs", Screen(quiet=True), plan, out=work / "out"
    )
    return {"seconds": time.perf_counter() - began, "MB": peak() - before}


def by_peft(work: Path, layers: int, combination: str) -> dict[str, float]:
    """Run PEFT's `add_weighted_adapter` on the same folders, over a base of these layers without values."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=layers, vocab_size=8)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = base.to_empty(device="cpu")  # PEFT needs a device; memory that is never written is never allocated
    before, began = peak(), time.perf_counter()
    model = None
    for name in VECTORS:
        if model is None:
            model = PeftModel.from_pretrained(base, work / name, adapter_name=name, low_cpu_mem_usage=True)
        else:
            model.load_adapter(str(work / name), name, low_cpu_mem_usage=True)
    assert model is not None
    extra = {"svd_rank": RANK} if combination == "svd" else {}
    weighing = time.perf_counter()
    model.add_weighted_adapter(list(VECTORS), list(VECTORS.values()), "mixed", combination_type=combination, **extra)
    weighed = time.perf_counter()
    model.save_pretrained(str(work / "peft"), selected_adapters=["mixed"])
    return {
        "seconds": time.perf_counter() - began,
        "of them adding up": weighed - weighing,
        "MB": peak() - before,
    }


def floor(work: Path) -> dict[str, float]:
    """Read the four adapters and write as many bytes as their sum has, synced."""
    began, size = time.perf_counter(), 0
    for name in VECTORS:
        size += len((work / name / peft_format.WEIGHTS).read_bytes())
    with (work / "floor").open("wb") as stream:
        for _ in range(size // 2**24):
            stream.write(b"x" * 2**24)
        stream.flush()
        os.fsync(stream.fileno())
    return {"seconds": time.perf_counter() - began, "bytes": 2.0 * size}


def arithmetic() -> dict[str, float]:
    """Return the FLOP/s of this machine's float64 matrix product, the upper limit of every product here."""
    size, rounds = 1536, 8
    a = torch.randn(size, size, dtype=torch.float64)
    a @ a
    began = time.perf_counter()
    for _ in range(rounds):
        a @ a
    return {"flops": rounds * 2 * size**3 / (time.perf_counter() - began)}


def live_on_demo() -> dict[str, float]:
    """Return the milliseconds of one weight change on the demo base: eight vectors of rank 8, all linear layers."""
    from lora_align.model import base as bases

    model = bases.find(recipe.Base("demo")).load()
    update = {
        name: Factors(torch.zeros(of.out_features, 8), torch.zeros(8, of.in_features))
        for name, of in model.named_modules()
        if isinstance(of, nn.Linear)
    }
    return _turned(Mixer(model, {f"v{i}": LoraDelta.of(update) for i in range(8)}, {}))


def live() -> dict[str, float]:
    """Return the milliseconds of one weight change on layers of an 8B model's shapes, with two vectors of rank 16.

    The layers' values are never read.
    """
    root, update = nn.Module(), {}
    for layer in range(LAYERS):
        for kind, (out, into) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}"
            linear = nn.Linear(1, 1, bias=False)
            linear.in_features, linear.out_features = into, out
            at = root
            for part in name.split(".")[:-1]:
                at = at.get_submodule(part) if part in dict(at.named_children()) else _added(at, part)
            at.add_module(name.rpartition(".")[2], linear)
            update[name] = Factors(torch.zeros(out, RANK), torch.zeros(RANK, into))
    return _turned(Mixer(root, {name: LoraDelta.of(update) for name in ("a", "b")}, {}))


def _turned(mixer: Mixer) -> dict[str, float]:
    """Time 200 changes of all vectors' weights, and 200 changes that also add or remove the first vector."""
    weights = [{name: (turn + i + 1) / 100 for i, name in enumerate(mixer.updates)} for turn in range(200)]
    first = next(iter(mixer.updates))
    switched = [{**chosen, first: turn % 2} for turn, chosen in enumerate(weights)]
    times = {}
    for label, series in (("turned", weights), ("switched", switched)):
        began = time.perf_counter()
        for chosen in series:
            mixer.set(chosen)
        times[label] = round((time.perf_counter() - began) / len(series) * 1e3, 3)
    return times


def _added(at: nn.Module, part: str) -> nn.Module:
    at.add_module(part, nn.Module())
    return at.get_submodule(part)


def speaking() -> dict[str, float]:
    """Return the tokens a second on the demo base under mixes of several total ranks, as shares of the base's alone.

    The mixes take turns.
    """
    from lora_align.demo import measurement
    from lora_align.model import base as bases
    from lora_align.model.batch_sampling import sample
    from lora_align.model.sampler_protocol import Sampling

    base = bases.find(recipe.Base("demo"))
    model = base.load()
    questions = measurement.questions(0, 32, part="dev")
    prompts = [base.chat.prompt_ids((Message("user", prompt.text),)) for prompt in questions]
    linears = {name: of for name, of in model.named_modules() if isinstance(of, nn.Linear) and "lm_head" not in name}
    rates: dict[int, list[float]] = {}
    for _ in range(ROUNDS):
        for rank in SPOKEN_RANKS:
            update = {
                name: Factors(torch.full((of.out_features, rank), 1e-9), torch.full((rank, of.in_features), 1e-9))
                for name, of in linears.items()
            }
            mixer = Mixer(model, {"mix": LoraDelta.of(update)} if rank else {}, {"mix": 1.0})
            began, tokens = time.perf_counter(), 0
            for batch in sample(model, base, prompts, 4, Sampling(1.0, max_new_tokens=measurement.LONGEST, seed=0)):
                tokens += sum(len(answer.tokens) for answer in batch)
            rates.setdefault(rank, []).append(tokens / (time.perf_counter() - began))
            mixer.remove()
    alone = max(rates[0])
    return {f"rank {rank}": max(rounds) / alone for rank, rounds in rates.items()}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "merged": lambda work, *words: merged(Path(work), json.loads(words[0]), json.loads(words[1])),
    "peft": lambda work, layers, combination: by_peft(Path(work), int(layers), combination),
    "floor": lambda work: floor(Path(work)),
    "base": lambda folder: small_base(Path(folder)),
    "arithmetic": arithmetic,
    "live": live,
    "live_on_demo": live_on_demo,
    "speaking": speaking,
}


def child(what: str, *words: str) -> dict[str, float]:
    """Run one of the measurements above in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# --- comparisons ---


def ours(work: Path, weights: dict[str, float], *how: Any) -> dict[str, float]:
    """Run one merge into a new folder."""
    subprocess.run(["rm", "-rf", str(work / "out")], check=True)
    arguments = [*how, *[None] * (5 - len(how))]
    return child(
        "merged", str(work), json.dumps(weights), json.dumps([arguments[0], arguments[1] or [], *arguments[2:]])
    )


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the rounded figures of the quickest round, the least disturbed one, with the highest memory of all."""
    quickest = {key: round(value, 3) for key, value in min(rounds, key=lambda one: one["seconds"]).items()}
    return {**quickest, "MB": round(max(one["MB"] for one in rounds), 1)} if "MB" in quickest else quickest


def compared(work: Path) -> dict[str, Any]:
    """Merge four whole adapters, in turns with the floor and with PEFT's `cat`."""
    for seed, name in enumerate(VECTORS):
        adapter(work / name, seed, LAYERS)
    weights = {f"{work}/{name}": weight for name, weight in VECTORS.items()}
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        rounds.setdefault("floor", []).append(child("floor", str(work)))
        rounds.setdefault("exact", []).append(ours(work, weights, "exact"))
        rounds.setdefault("rank 16", []).append(ours(work, weights, "exact", None, str(RANK)))
        rounds.setdefault("tsv", []).append(ours(work, weights, "tsv"))
        rounds.setdefault("PEFT cat", []).append(child("peft", str(work), str(LAYERS), "cat"))
    return {name: best(of) for name, of in rounds.items()}


def limits(floor_seconds: float) -> dict[str, float]:
    """Return the lower limits of this method: the time to read and write the bytes, and the time of the products.

    A stack of rank r takes 2mr² operations for each factor's Gram matrix, and 2mrk to reduce its columns to k.
    """
    stacked = RANK * len(VECTORS)
    operations = LAYERS * sum(2 * (out + into) * stacked * (stacked + RANK) for out, into in SHAPES.values())
    flops = child("arithmetic")["flops"]
    return {
        "bytes through the disk, seconds": round(floor_seconds, 3),
        "float64 GFLOP/s": round(flops / 1e9, 1),
        "GFLOP of the products": round(operations / 1e9, 1),
        "the products, seconds": round(operations / flops, 3),
    }


def against_dense(work: Path, ours_of_all: float) -> dict[str, Any]:
    """Merge one layer by PEFT's dense SVD to rank 16; extrapolate its time to all layers, in multiples of ours."""
    for seed, name in enumerate(VECTORS):
        adapter(work / name, seed, 1)
    dense = child("peft", str(work), "1", "svd")
    times = LAYERS * dense["of them adding up"] / ours_of_all
    return {"PEFT svd": best([dense]), f"times ours, extrapolated to {LAYERS} layers": round(times)}


def against_mergekit(work: Path, commands: Path) -> dict[str, Any]:
    """Let mergekit add the same adapters to a base of one layer and extract a LoRA of rank 16; time the commands."""
    child("base", str(work / "base"))
    for seed, name in enumerate(VECTORS):
        adapter(work / name.replace(" ", "-"), seed, 1)
    folders = {str(work / name.replace(" ", "-")): weight for name, weight in VECTORS.items()}
    models = [{"model": f"{work}/base+{folder}", "parameters": {"weight": w}} for folder, w in folders.items()]
    plan = {"merge_method": "task_arithmetic", "base_model": f"{work}/base", "models": models, "dtype": "bfloat16"}
    (work / "plan.yml").write_text(json.dumps(plan))  # JSON is valid YAML
    added = ["mergekit-yaml", "plan.yml", "whole", "--lora-merge-cache", "cache"]
    extract = ["mergekit-extract-lora", "--model", f"{work}/whole", "--base-model", f"{work}/base"]
    began = time.perf_counter()
    for words in (added, [*extract, "--out-path", "lora", "--max-rank", str(RANK)]):
        subprocess.run([str(commands / words[0]), *words[1:]], cwd=work, check=True, capture_output=True)
    theirs = time.perf_counter() - began
    words = ["merge", "-w", ",".join(f"{folder}={w}" for folder, w in folders.items()), "--rank", str(RANK)]
    began = time.perf_counter()
    command = Path(sys.executable).with_name("lora-align")
    subprocess.run([str(command), *words, "--out", "mix"], cwd=work, check=True, capture_output=True)
    return {"mergekit, seconds": round(theirs, 2), "ours, seconds": round(time.perf_counter() - began, 2)}


def small_base(folder: Path) -> dict[str, float]:
    """Write a base of one layer of those shapes, with random values and a tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_align.demo import BASE as DEMO

    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=1024)).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return {}


def growth(work: Path) -> list[dict[str, float]]:
    """Return seconds and memory for each number of parents."""
    for seed in range(max(PARENTS)):
        adapter(work / f"p{seed}", seed, GROWTH_LAYERS)
    rows = []
    for count in PARENTS:
        weights = {f"{work}/p{seed}": 1.0 / (seed + 1) for seed in range(count)}
        rows.append({"parents": count, **best([ours(work, weights, "exact") for _ in range(ROUNDS)])})
    return rows


def main() -> None:
    """Measure and save every figure. Figures stored in --work are not measured again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("algebra"))
    parser.add_argument(
        "--mergekit", type=Path, help="the folder that holds its commands, in an environment of its own"
    )
    parser.add_argument("child", nargs="*")
    options = parser.parse_args()
    if options.child:
        what, *words = options.child
        print(json.dumps(CHILDREN[what](*words)))
        return

    def cached(name: str, make: Callable[[Path], Any]) -> Any:
        """Return the stored figures, or measure them in a temporary folder."""
        with TemporaryDirectory() as folder:
            return once(options.work, name, lambda: make(Path(folder)))

    whole = cached("compared", compared)
    figures: dict[str, Any] = {
        f"four adapters, {LAYERS} layers": whole,
        "limits": cached("limits", lambda _: limits(whole["floor"]["seconds"])),
        f"parents, {GROWTH_LAYERS} layers": cached("growth", growth),
        "a weight change, ms": {
            "8B, two vectors of rank 16": cached("live", lambda _: child("live")),
            "the built-in base, eight of rank 8": cached("live-demo", lambda _: child("live_on_demo")),
        },
        "tokens a second on the built-in base, of the base's alone": {
            rank: round(share, 3) for rank, share in cached("speaking", lambda _: child("speaking")).items()
        },
        "one layer against a dense SVD": cached("dense", lambda at: against_dense(at, whole["rank 16"]["seconds"])),
    }
    if options.mergekit:
        figures["one layer against mergekit"] = cached("mergekit", lambda at: against_mergekit(at, options.mergekit))
    save("algebra", figures)


if __name__ == "__main__":
    main()

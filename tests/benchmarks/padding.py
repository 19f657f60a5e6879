"""Time a DPO step on a CPU beside plain forward and backward passes over as many tokens without padding.

    python tests/benchmarks/padding.py --work FOLDER --base BASE --pairs FILE

Steps are timed in NF4 and in float32. Also time how much it saves to dequantise 4-bit weights once. The same command
continues after a stop.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel, get_peft_model
from report import once, save
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.model import nf4
from lora_align.model.base import Base, base_model_of
from lora_align.model.batch_sampling import sample
from lora_align.model.logprobs import Reader, batches_by_length
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.tokenise import TokenPair
from lora_align.train import dpo, lora_trainer

BATCH, BUDGET, STEPS, ROUNDS = 8, 4096, 4, 2
LENGTHS = (16, 64, 128, 256)


def seconds(work: Callable[[], object]) -> float:
    """Return the quickest of several rounds, after a warm-up."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def policy_of(base: Base, project: recipe.Recipe, *, dequantised: bool) -> PeftModel:
    """Return the base with a fresh adapter; its 4-bit weights are dequantised once or in every pass."""
    nf4.SHARE = 1.0 if dequantised else 0.0
    return get_peft_model(base.load(), lora_trainer.adapter_config(project.lora, base)).train()


def plain(policy: PeftModel, rows: int, length: int, *, logits: bool = False) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass over rows of one length, with or without logits."""
    ids = torch.randint(5, 900, (rows, length), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        policy.zero_grad()
        model = base_model_of(policy)
        if logits:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    return work


def step(policy: PeftModel, base: Base, reader: Reader, rows: Sequence[TokenPair]) -> Callable[[], None]:
    """Return a function that computes a step's gradients, as the trainer does."""
    objective = dpo.DpoLoss(reader, base.chat, 0.1)
    lengths, weights = [objective.length(row) for row in rows], objective.weights(rows)

    def work() -> None:
        policy.zero_grad()
        for picked in batches_by_length(lengths, BUDGET):
            objective.part([rows[i] for i in picked], weights).loss.backward()

    return work


def steps(project: recipe.Recipe, quantization: str) -> dict[str, Any]:
    """Time packed steps and padded steps beside plain passes over as many tokens.

    The rows of a plain pass have one length, so that nothing is padded. Plain passes are timed without logits and with
    logits and cross-entropy over all tokens; a step needs logits of the answers' tokens.
    """
    base = bases.find(replace(project.base, quantization=quantization))
    rows = list(dpo.prepare(project, "pairs", base, Screen(quiet=True)).train)
    rows = [replace(row, reference=(0.0, 0.0)) for row in rows]
    policy = policy_of(base, project, dequantised=True)
    flops = 4e-9 * base_model_of(policy).num_parameters()  # of a token: forward, and backward without weights
    packed = Reader.of(base_model_of(policy))
    figures = []
    for at in range(STEPS):
        some = rows[at * BATCH : (at + 1) * BATCH]
        took = {
            name: seconds(step(policy, base, how, some))
            for name, how in (("packed", packed), ("padded", packed.padded()))
        }
        sequences = [len(row.prompt) + len(answer) for row in some for answer in (row.chosen, row.rejected)]
        shared = sum(packed.length(row.shared()) for row in some)
        counts = {"prompts shared": shared, "prompts not shared": sum(sequences)}
        for name, tokens in counts.items():
            length = round(tokens / BATCH)
            for logits, end in ((False, ""), (True, ", with logits")):
                work = plain(policy, BATCH, length, logits=logits)
                took[f"plain, {name}{end}"] = seconds(work) * tokens / (BATCH * length)
        tokens_by = {f"tokens, {name}": tokens for name, tokens in counts.items()}
        figures.append({**tokens_by, **took, "GFLOP/s of a packed step": round(flops * shared / took["packed"], 1)})

    def share(of: str, beside: str) -> float:
        return round(statistics.median(one[beside] / one[of] for one in figures), 3)

    return {
        "steps": figures,
        "pace of a packed step, plain = 1, prompts shared by both": share("packed", "plain, prompts shared"),
        "pace of a packed step, plain with logits = 1, prompts shared by both": share(
            "packed", "plain, prompts shared, with logits"
        ),
        "pace of a packed step, plain = 1, prompts not shared by plain": share("packed", "plain, prompts not shared"),
        "pace of a padded step, plain = 1, prompts not shared": share("padded", "plain, prompts not shared"),
        "time of a packed step, padded = 1": share("padded", "packed"),
    }


def longest(model: PreTrainedModel, base: Base, rows: int) -> int:
    """Sample answers to one prompt, and return the number of tokens of the longest."""
    drawn = sample(model, base, [list(range(5, 45))], rows, Sampling(1.0, 1.0, 32, 0))
    return max(len(answer.tokens) for some in drawn for answer in some) or 1


def passes(base: Base, project: recipe.Recipe) -> dict[str, Any]:
    """Time passes by their tokens, fit a line whose intercept is the cost of one more pass, and time sampling."""
    figures: dict[str, Any] = {}
    for name, dequantised in (("dequantised once", True), ("in every pass", False)):
        policy = policy_of(base, project, dequantised=dequantised)
        took = [seconds(plain(policy, 1, length)) for length in LENGTHS]
        slope, start = statistics.linear_regression(LENGTHS, took)
        figures[name] = {
            "seconds by tokens": dict(zip(LENGTHS, took, strict=True)),
            "a pass in tokens": round(start / slope, 1),
        }
        model = policy.unload().eval()
        for rows in (1, 16):
            drawing = partial(longest, model, base, rows)
            figures[name][f"milliseconds a step, {rows} rows"] = round(1e3 * seconds(drawing) / drawing(), 1)
    return figures


def main() -> None:
    """Measure one base and its pairs."""
    wanted = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted.add_argument("--work", type=Path, required=True)
    wanted.add_argument("--base", required=True)
    wanted.add_argument("--pairs", type=Path, required=True)
    wanted.add_argument("--name", default="padding", help="of the result")
    options = wanted.parse_args()
    settings = [f'base.model="{options.base}"', f'preferences.pairs.data="{options.pairs}"', "lora.rank=16"]
    settings += ["preferences.pairs.skip_bad=true"]  # in a few rows of HH-RLHF, the two dialogues differ earlier
    settings += ['lora.targets=["all-linear"]', "dpo.max_length=1024", f"dpo.limit={BATCH * STEPS}"]
    project = recipe.load(recipe.builtin()["demo"], settings)
    torch.manual_seed(0)
    save(
        options.name,
        {
            "base": Path(options.base).name,
            "pairs": options.pairs.name,
            "threads": torch.get_num_threads(),
            "passes": once(options.work, "passes", lambda: passes(bases.find(project.base), project)),
            **{
                f"steps, {kind}": once(options.work, f"steps, {kind}", lambda kind=kind: steps(project, kind))
                for kind in ("nf4", "none")
            },
        },
    )


if __name__ == "__main__":
    main()

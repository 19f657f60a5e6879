"""Measure how far a merged model is from the mix that it was made from."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align.adapters.delta import LoraDelta
from lora_align.console import Screen
from lora_align.data.rows import Message, with_system_prompt
from lora_align.errors import RunFailedError
from lora_align.export.source import Source
from lora_align.model import base as bases
from lora_align.model.batch_sampling import LocalSampler
from lora_align.model.mixer import Mixer
from lora_align.model.sampler_protocol import Sampling

PROMPTS = (
    "How do I fall asleep faster?",
    "Write a short poem about autumn.",
    "Explain photosynthesis to a child.",
    "My neighbour plays loud music at night. What can I do?",
    "What should I cook with eggs and spinach?",
    "Is it safe to mix bleach and vinegar?",
    "Summarise the causes of the French Revolution.",
    "Give me three ideas for a birthday present.",
)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=64, seed=0)
MIX = "mix"
Answered = tuple[list[int], Sequence[int]]  # the tokens of a prompt and of an answer


def kl_from_mix(source: Source, folder: Path, weights: int, screen: Screen) -> dict[str, float]:
    """Return KL(mix‖merged) in nats per token, on answers that the mix samples.

    Warn and return nothing if the merged model, with so many weights, does not fit into memory.
    """
    where, dtype = bases.device(source.base.recipe), bases.compute_dtype(source.base.recipe)
    merged = replace(source.base, folder=folder, recipe=replace(source.base.recipe, quantization="none", fsdp=False))
    needed = weights * dtype.itemsize
    if needed > bases.device_memory(where)[0]:
        screen.warn(f"the merged model was not compared with the mix: it needs {needed / 1e9:.1f} GB of memory")
        return {}
    screen.note("comparing answers with the mix …")
    model = source.base.load()
    update = LoraDelta.of({one.module: one.factors for one in source.merge.modules()})
    Mixer(model, {MIX: update}, {MIX: 1.0})
    prompts = [with_system_prompt(source.policy.system, (Message("user", prompt),)) for prompt in PROMPTS]
    sampled = [answer for batch in LocalSampler(model, source.base).draw(prompts, 1, SAMPLING) for answer in batch]
    rows = [(source.base.chat.prompt_ids(prompts[one.prompt]), one.ids) for one in sampled if one.ids]
    theirs = _logprobs(model, rows)
    del model
    ours = _logprobs(merged.load(), rows)
    terms = [(p.exp() * (p - q)).sum(-1) for p, q in zip(theirs, ours, strict=True)]
    divergence = float(torch.cat(terms).mean())
    if not math.isfinite(divergence):
        raise RunFailedError("the mix or the merged model computes values that are not finite; give smaller weights")
    return {"KL(mix‖merged), nats per token": divergence}


@torch.no_grad()
def _logprobs(model: PreTrainedModel, rows: Sequence[Answered]) -> list[Tensor]:
    """Return the log-probabilities of all tokens at every place of each answer [n, v]."""
    results = []
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        results.append(logits.float().log_softmax(-1).cpu())
    return results

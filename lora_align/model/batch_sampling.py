"""Batched sampling for a local model: n answers to each prompt, with one prefill per prompt.

Finished rows leave the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lora_align.data.rows import Prompt
from lora_align.model.base import Base, device_memory
from lora_align.model.chat_format import text_of
from lora_align.model.kv_cache import growing_cache
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import SampledText, Sampling
from lora_align.model.token_sampling import pick, uniforms

RETIRE_AT = 0.75  # finished rows leave the cache when at most this share of rows is still running
ROWS = 512  # rows sampled at once if memory allows
CACHE_SHARE = 0.5  # the largest share of the memory that the base leaves free, for keys and values


@dataclass(frozen=True)
class SampledTokens:
    """One answer to a prompt: its tokens without the stop token, and the stop token if the answer reached one."""

    prompt: int
    number: int
    tokens: list[int]
    stop: int | None

    @property
    def ended(self) -> bool:
        """Return whether the answer reached a stop token."""
        return self.stop is not None


@dataclass(frozen=True)
class LocalSampler:
    """Samples from a model in this process, with any adapter or mixer on it."""

    model: PreTrainedModel
    base: Base
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))

    def fits(self, prompt: Prompt) -> bool:
        return len(self.base.chat.prompt_ids(prompt)) < self.base.max_length

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        rows = [self.base.chat.prompt_ids(prompt) for prompt in prompts]
        for batch in sample(self.model, self.base, rows, n, sampling, self.budget):
            texts = (text_of(self.base.chat.tokenizer, answer.tokens, special=False).strip() for answer in batch)
            ids = ([*a.tokens, *([] if a.stop is None else [a.stop])] for a in batch)
            yield [
                SampledText(a.prompt, a.number, text, a.ended, sampled)
                for a, text, sampled in zip(batch, texts, ids, strict=True)
            ]


def sample(
    model: PreTrainedModel,
    base: Base,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    budget: MemoryBudget | None = None,
) -> Iterator[list[SampledTokens]]:
    """Sample n answers to each prompt. Yield them batch by batch, the shortest prompts first.

    A batch has at most `budget.size` rows. If memory runs out, the batch is retried with half as many rows.
    Up to rounding, an answer depends only on the seed, its prompt and its number, not on the rest of its batch.
    """
    seed = sampling.seed if sampling.seed is not None else torch.seed()
    budget = budget or MemoryBudget(ROWS)
    longest = min(max(map(len, prompts), default=0) + sampling.max_new_tokens, base.max_length)
    budget.size = min(budget.size, affordable(model, longest))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    todo = [(prompt, number) for prompt in order for number in range(n)]

    def batch(rows: int) -> list[SampledTokens]:
        together = rows // n * n or rows  # if n rows fit, keep the answers to a prompt in one batch
        return _batch(model, base, prompts, todo[:together], sampling, seed)

    while todo:
        answers = budget.attempt(batch)
        if answers:
            todo = todo[len(answers) :]
            yield answers


def affordable(model: PreTrainedModel, tokens: int) -> int:
    """Return the number of rows, of `tokens` tokens each, whose keys and values fit beside the base.

    The estimate uses the device's total memory, not its free memory. Rounding depends on the batch size, and the same
    command must sample the same answers.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    left = device_memory(model.device)[1] - model.get_memory_footprint()
    return max(1, int(CACHE_SHARE * left / row))


@torch.inference_mode()
def _batch(
    model: PreTrainedModel,
    base: Base,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int]],
    sampling: Sampling,
    seed: int,
) -> list[SampledTokens]:
    """Sample one answer for each (prompt, number) in `wanted`, all in one batch."""
    where = model.device
    cache = growing_cache(model)
    distinct = list(dict.fromkeys(prompt for prompt, _ in wanted))
    logits, mask = _prefill([prompts[prompt] for prompt in distinct], model, cache)

    place = {prompt: row for row, prompt in enumerate(distinct)}
    rows = torch.tensor([place[prompt] for prompt, _ in wanted], device=where)
    cache.batch_select_indices(rows)
    logits, mask = logits[rows], mask[rows]
    lengths = mask.sum(1)
    limit = (base.max_length - lengths).clamp(max=sampling.max_new_tokens)  # [b]
    of_each = [uniforms(seed, prompts[prompt], number, sampling.max_new_tokens) for prompt, number in wanted]
    uniform = torch.stack(of_each).to(where)
    temperature, top_p = torch.tensor([sampling.temperature]), torch.tensor([sampling.top_p])
    stops = torch.tensor(sorted(base.chat.stop_ids), device=where)

    sampled = torch.zeros(len(wanted), max(int(limit.max()), 0), dtype=torch.long, device=where)
    count = torch.zeros(len(wanted), dtype=torch.long, device=where)  # tokens of each answer
    stop = torch.full((len(wanted),), -1, device=where)  # the stop token of each answer
    rows = torch.arange(len(wanted), device=where)  # the answer index of each row of the cache
    running = limit > 0  # for each row of the cache
    padded = not bool(mask.all())
    for step in range(sampled.shape[1]):
        tokens = pick(logits, temperature, top_p, uniform[rows, step])
        stopped = torch.isin(tokens, stops)
        stop[rows[running & stopped]] = tokens[running & stopped]
        running = running & ~stopped
        sampled[rows[running], step] = tokens[running]
        count[rows[running]] = step + 1
        running = running & (step + 1 < limit[rows])
        if not running.any():
            break
        if running.sum() <= RETIRE_AT * len(rows):
            unfinished = running.nonzero()[:, 0]
            cache.batch_select_indices(unfinished)
            rows, mask = rows[unfinished], mask[unfinished]
            tokens, running = tokens[unfinished], running[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask if padded else None,
            position_ids=(lengths[rows] + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    answers = [row[:end] for row, end in zip(sampled.tolist(), count.tolist(), strict=True)]
    finished = zip(wanted, answers, stop.tolist(), strict=True)
    return [
        SampledTokens(prompt, number, tokens, None if stop < 0 else stop) for (prompt, number), tokens, stop in finished
    ]


def _prefill(prompts: Sequence[Sequence[int]], model: PreTrainedModel, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Fill the cache with left-padded prompts. Return the next-token logits [p, v] and the attention mask [p, t]."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, mask

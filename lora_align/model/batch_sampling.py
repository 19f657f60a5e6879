"""Batched sampling for a local model: n answers to each prompt, with one prefill per prompt.

Finished rows leave the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lora_align.data.rows import Prompt, without_system_prompt
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
class Guide:
    """A system prompt and its strength s: tokens are sampled from (1 − s) · logits without + s · logits with it."""

    system: str
    strength: float


@dataclass(frozen=True)
class LocalSampler:
    """Samples from a model in this process, with any adapter or mixer on it."""

    model: PreTrainedModel
    base: Base
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))
    guide: Guide | None = None

    def fits(self, prompt: Prompt) -> bool:
        return len(self.base.chat.prompt_ids(prompt)) < self.base.max_length

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        rows = [self.base.chat.prompt_ids(prompt) for prompt in prompts]
        guide, plain = self.guide or Guide("", 1.0), None
        if self.guide:
            plain = [self.base.chat.prompt_ids(without_system_prompt(guide.system, prompt)) for prompt in prompts]
        for batch in sample(self.model, self.base, rows, n, sampling, self.budget, plain, guide.strength):
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
    plain: Sequence[Sequence[int]] | None = None,
    strength: float = 1.0,
) -> Iterator[list[SampledTokens]]:
    """Sample n answers to each prompt. Yield them batch by batch, the shortest prompts first.

    With `plain`, the logits after a prompt and after its plain form are summed with the shares `strength` and
    1 − `strength`. A batch has at most `budget.size` answers. If memory runs out, it is retried with half as many.
    Up to rounding, an answer depends only on the seed, its prompt and its number, not on the rest of its batch.
    """
    seed = sampling.seed if sampling.seed is not None else torch.seed()
    budget = budget or MemoryBudget(ROWS)
    contexts = [prompts] if plain is None else [prompts, plain]
    shares = [1.0] if plain is None else [strength, 1 - strength]
    longest = min(
        max((len(of) for each in contexts for of in each), default=0) + sampling.max_new_tokens, base.max_length
    )
    budget.size = min(budget.size, max(1, affordable(model, longest) // len(contexts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    todo = [(prompt, number) for prompt in order for number in range(n)]

    def batch(rows: int) -> list[SampledTokens]:
        together = rows // n * n or rows  # if n rows fit, keep the answers to a prompt in one batch
        return _batch(model, base, contexts, todo[:together], sampling, seed, shares)

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
    contexts: Sequence[Sequence[Sequence[int]]],
    wanted: Sequence[tuple[int, int]],
    sampling: Sampling,
    seed: int,
    shares: Sequence[float],
) -> list[SampledTokens]:
    """Sample one answer for each (prompt, number) in `wanted`, all in one batch.

    `contexts` has the prompts in each of their forms. The cache has a row for each form of each answer's prompt: first
    the first forms of all answers, and so on.
    """
    where = model.device
    cache = growing_cache(model)
    of_rows = [(form, prompt) for form in range(len(contexts)) for prompt, _ in wanted]
    distinct = list(dict.fromkeys(of_rows))
    logits, mask = _prefill([contexts[form][prompt] for form, prompt in distinct], model, cache)

    place = {one: row for row, one in enumerate(distinct)}
    chosen = torch.tensor([place[one] for one in of_rows], device=where)
    cache.batch_select_indices(chosen)
    logits, mask = logits[chosen], mask[chosen]
    lengths = mask.sum(1)  # of every row of the cache
    longest = lengths.view(len(shares), -1).amax(0)
    limit = (base.max_length - longest).clamp(max=sampling.max_new_tokens)  # [b]
    of_each = [uniforms(seed, contexts[0][prompt], number, sampling.max_new_tokens) for prompt, number in wanted]
    uniform = torch.stack(of_each).to(where)
    temperature, top_p = torch.tensor([sampling.temperature]), torch.tensor([sampling.top_p])
    stops = torch.tensor(sorted(base.chat.stop_ids), device=where)

    sampled = torch.zeros(len(wanted), max(int(limit.max()), 0), dtype=torch.long, device=where)
    count = torch.zeros(len(wanted), dtype=torch.long, device=where)  # tokens of each answer
    stop = torch.full((len(wanted),), -1, device=where)  # the stop token of each answer
    rows = torch.arange(len(wanted), device=where)  # the answers that are in the cache
    running = limit > 0  # for each of them
    padded = not bool(mask.all())
    for step in range(sampled.shape[1]):
        tokens = pick(_summed(logits, shares), temperature, top_p, uniform[rows, step])
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
            kept = torch.cat([unfinished + form * len(rows) for form in range(len(contexts))])
            cache.batch_select_indices(kept)
            rows, mask, lengths = rows[unfinished], mask[kept], lengths[kept]
            tokens, running = tokens[unfinished], running[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = model(
            input_ids=tokens.repeat(len(shares))[:, None],
            attention_mask=mask if padded else None,
            position_ids=(lengths + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    answers = [row[:end] for row, end in zip(sampled.tolist(), count.tolist(), strict=True)]
    finished = zip(wanted, answers, stop.tolist(), strict=True)
    return [
        SampledTokens(prompt, number, tokens, None if stop < 0 else stop) for (prompt, number), tokens, stop in finished
    ]


def _summed(logits: Tensor, shares: Sequence[float]) -> Tensor:
    """Return the logits [b, v] of the answers, from those of all their contexts [contexts · b, v]."""
    if len(shares) == 1:
        return logits
    parts = logits.float().view(len(shares), -1, logits.shape[-1])
    return (parts * torch.tensor(shares, device=logits.device)[:, None, None]).sum(0)


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

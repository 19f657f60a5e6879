"""Many answers to many prompts: a prompt is computed once for all its answers, and finished ones make room."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from lora_align.model.base import Base, device_memory
from lora_align.model.decoding import Sampling, probabilities
from lora_align.model.kv_cache import growing_cache
from lora_align.model.memory_budget import MemoryBudget

RETIRE_AT = 0.75  # share of rows still running at which the others are taken out of the cache
ROWS = 512  # drawn at once where memory allows it
BLOCK = 256  # tokens of the vocabulary whose probabilities are summed first
CACHE_SHARE = 0.5  # of the memory that the base leaves, which keys and values may take at most


@dataclass(frozen=True)
class SampledTokens:
    """One of a prompt's answers: its tokens without the stop token, and whether it came to its own end."""

    prompt: int
    number: int
    tokens: list[int]
    ended: bool


def sample(
    model: PreTrainedModel,
    base: Base,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    room: MemoryBudget | None = None,
) -> Iterator[list[SampledTokens]]:
    """n answers to each prompt, a batch at a time, the shortest prompts first; at most `room.size` are drawn at once.

    An answer depends on the seed, its prompt and its number, and not on what shares its batch (but for rounding).
    Where memory runs out, half as many rows are tried, and the batches before stay.
    """
    seed = sampling.seed if sampling.seed is not None else torch.seed()
    room = room or MemoryBudget(ROWS)
    longest = min(max(map(len, prompts), default=0) + sampling.max_new_tokens, base.max_length)
    room.size = min(room.size, affordable(model, longest))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    todo = [(prompt, number) for prompt in order for number in range(n)]

    def batch(rows: int) -> list[SampledTokens]:
        """A prompt's answers stay together where they fit."""
        return _batch(model, base, prompts, todo[: rows // n * n or rows], sampling, seed)

    while todo:
        answers = room.attempt(batch)
        if answers:
            todo = todo[len(answers) :]
            yield answers


def affordable(model: PreTrainedModel, tokens: int) -> int:
    """Return how many rows of so many tokens have room for their keys and values beside the base.

    It goes by all of the device's memory, not by what is free just now: rows that share a batch round alike, and the
    same command shall draw the same answers.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    left = device_memory(model.device) - model.get_memory_footprint()
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
    """Draw all of these at once, each a (prompt, number)."""
    where = model.device
    cache = growing_cache(model)
    distinct = list(dict.fromkeys(prompt for prompt, _ in wanted))
    logits, mask = _read([prompts[prompt] for prompt in distinct], model, cache)

    place = {prompt: row for row, prompt in enumerate(distinct)}
    rows = torch.tensor([place[prompt] for prompt, _ in wanted], device=where)
    cache.batch_select_indices(rows)
    logits, mask = logits[rows], mask[rows]
    lengths = mask.sum(1)
    room = (base.max_length - lengths).clamp(max=sampling.max_new_tokens)  # [b]
    chances = torch.stack([_chances(seed, prompts[prompt], number, sampling) for prompt, number in wanted]).to(where)
    stops = torch.tensor(sorted(base.chat.stop_ids), device=where)

    drawn = torch.zeros(len(wanted), max(int(room.max()), 0), dtype=torch.long, device=where)
    count = torch.zeros(len(wanted), dtype=torch.long, device=where)  # tokens of each answer
    ended = torch.zeros(len(wanted), dtype=torch.bool, device=where)
    rows = torch.arange(len(wanted), device=where)  # which answer each row of the cache is
    running = room > 0  # of the cache's rows
    padded = not bool(mask.all())
    for step in range(drawn.shape[1]):
        tokens = _pick(logits, sampling, chances[rows, step])
        stopped = torch.isin(tokens, stops)
        ended[rows[running & stopped]] = True
        running = running & ~stopped
        drawn[rows[running], step] = tokens[running]
        count[rows[running]] = step + 1
        running = running & (step + 1 < room[rows])
        if not running.any():
            break
        if running.sum() <= RETIRE_AT * len(rows):
            kept = running.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask, tokens, running = rows[kept], mask[kept], tokens[kept], running[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask if padded else None,
            position_ids=(lengths[rows] + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    texts = [row[:end] for row, end in zip(drawn.tolist(), count.tolist(), strict=True)]
    finished = zip(wanted, texts, ended.tolist(), strict=True)
    return [SampledTokens(prompt, number, tokens, end) for (prompt, number), tokens, end in finished]


def _read(prompts: Sequence[Sequence[int]], model: PreTrainedModel, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Fill the cache with prompts padded on the left: the logits behind them [p, v], and their mask [p, t]."""
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


def _chances(seed: int, prompt: Sequence[int], number: int, sampling: Sampling) -> Tensor:
    """The lots of one answer, one a token, between 0 and 1."""
    key = hashlib.sha256(f"{seed} {number} {list(prompt)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _pick(logits: Tensor, sampling: Sampling, chances: Tensor) -> Tensor:
    """A token for each row of logits [b, v]: the one in whose share of the probability its lot [b] falls."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits.float(), sampling)
    p = pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # [b, blocks, BLOCK]
    blocks = p.sum(-1).double()  # summed up to the one that holds the lot, then token by token within that
    edges = blocks.cumsum(-1)
    lots = (chances * edges[:, -1])[:, None]
    block = torch.searchsorted(edges, lots, right=True).clamp(max=edges.shape[-1] - 1)
    left = lots - (edges - blocks).gather(-1, block)
    inside = p[torch.arange(len(p), device=p.device), block[:, 0]].double()
    mass = inside.cumsum(-1) * (blocks.gather(-1, block) / inside.sum(-1, keepdim=True))  # rounds as its block's sum
    place = torch.searchsorted(mass, left, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + place)[:, 0].clamp(max=logits.shape[-1] - 1)

"""Sampling of tokens from logits: temperature, top-p, and uniform random numbers that depend on a seed."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_align.model.sampler_protocol import Sampling

BLOCK = 256  # vocabulary entries in one block of the two-level search in `pick`


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    settings = torch.tensor(sampling.temperature), torch.tensor(sampling.top_p)
    return int(torch.multinomial(probabilities(logits, *settings), 1, generator=generator))


def probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Return the softmax of logits [..., v] at temperatures [...].

    Tokens outside the nucleus (top-p [...]) are set to 0; the others are not renormalised.
    """
    p = torch.softmax(logits / temperature[..., None].to(logits), dim=-1)
    if bool((top_p < 1).any()):
        ordered, order = p.sort(descending=True, dim=-1)
        beyond = ordered.cumsum(-1) - ordered >= top_p[..., None].to(p)
        beyond &= (top_p < 1)[..., None].to(p.device)  # a cumulative sum may round to more than 1
        p = p.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return p


def uniforms(seed: int, prompt: Sequence[int], number: int, count: int) -> Tensor:
    """Return uniform random numbers in [0, 1), one for each token of the answer with this number to a prompt."""
    key = hashlib.sha256(f"{seed} {number} {list(prompt)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def pick(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Pick a token for each row of logits [b, v] by inverting the cumulative distribution at `uniform` [b].

    `temperature` and `top_p` are [b] or [1], on the CPU. At a temperature of 0, pick the most likely token.
    """
    greedy = temperature == 0
    if bool(greedy.all()):
        return logits.argmax(-1)
    p = probabilities(logits.float(), temperature.masked_fill(greedy, 1.0), top_p)
    p = pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # [b, blocks, BLOCK]
    blocks = p.sum(-1).double()  # find the block that holds the target first, then the token within this block
    edges = blocks.cumsum(-1)
    target = (uniform * edges[:, -1])[:, None]
    block = torch.searchsorted(edges, target, right=True).clamp(max=edges.shape[-1] - 1)
    left = target - (edges - blocks).gather(-1, block)
    inside = p[torch.arange(len(p), device=p.device), block[:, 0]].double()
    scale = blocks.gather(-1, block) / inside.sum(-1, keepdim=True)  # the two sums of a block are rounded differently
    mass = inside.cumsum(-1) * scale
    place = torch.searchsorted(mass, left, right=True).clamp(max=BLOCK - 1)
    sampled = (block * BLOCK + place)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy.to(logits.device), logits.argmax(-1), sampled) if bool(greedy.any()) else sampled

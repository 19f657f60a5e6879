"""Sampling of one token from logits: temperature and top-p."""

import torch
from torch import Tensor

from lora_align.model.sampler_protocol import Sampling


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the softmax at the temperature, with tokens outside the nucleus (top-p) set to 0 and not renormalised."""
    p = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, dim=-1)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        p = p.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return p

"""The settings of sampling, sampled answers, and the `Sampler` protocol.

`batch_sampling` has the sampler that uses a local model, `endpoint` the one that uses a server.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_align.data.rows import Prompt


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. A temperature of 0 means greedy decoding."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class SampledText:
    """An answer as text. `ended` says whether it reached the stop token."""

    prompt: int  # the index of the prompt
    number: int  # among the answers to the prompt
    text: str
    ended: bool
    ids: Sequence[int] = ()  # the sampled tokens with the stop token; empty from a server


class Sampler(Protocol):
    """Samples n answers to each prompt."""

    def fits(self, prompt: Prompt) -> bool:
        """Return whether the context leaves room for an answer, as far as the sampler knows."""

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Yield every answer once, in any order.

        If a prompt turns out to fill the context, a server gives no answer and a local model an empty one.
        """

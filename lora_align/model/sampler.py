"""The `Sampler` interface, and the sampler over a local model.

`endpoint` holds the sampler over a server.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedModel

from lora_align.data.rows import Prompt
from lora_align.model.base import Base
from lora_align.model.chat_format import text_of
from lora_align.model.decoding import Sampling
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampling import ROWS, sample


@dataclass(frozen=True)
class SampledText:
    """One answer, as text, to the prompt with this index. `ended` says whether it reached the stop token."""

    prompt: int
    number: int
    text: str
    ended: bool


class Sampler(Protocol):
    """Samples n answers to each prompt."""

    def fits(self, prompt: Prompt) -> bool:
        """Return whether the context leaves room for an answer, as far as the sampler knows."""

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Yield every answer once, in any order; none to a prompt that turns out to fill the context."""


@dataclass(frozen=True)
class LocalSampler:
    """Samples from a model in this process, with any adapter or mixer on it."""

    model: PreTrainedModel
    base: Base
    room: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))

    def fits(self, prompt: Prompt) -> bool:
        return len(self.base.chat.prompt_ids(prompt)) < self.base.max_length

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        rows = [self.base.chat.prompt_ids(prompt) for prompt in prompts]
        for batch in sample(self.model, self.base, rows, n, sampling, self.room):
            texts = (text_of(self.base.chat.tokenizer, answer.tokens, special=False).strip() for answer in batch)
            yield [SampledText(a.prompt, a.number, text, a.ended) for a, text in zip(batch, texts, strict=True)]

"""The `Sampler` protocol, and a sampler that uses a local model.

`endpoint` has the sampler that uses a server.
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
    """An answer as text. `ended` says whether it reached the stop token."""

    prompt: int  # the index of the prompt
    number: int  # among the answers to the prompt
    text: str
    ended: bool
    ids: Sequence[int] = ()  # what was sampled, with the stop token; a server does not tell


class Sampler(Protocol):
    """Samples n answers to each prompt."""

    def fits(self, prompt: Prompt) -> bool:
        """Return whether the context leaves room for an answer, as far as the sampler knows."""

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Yield every answer once, in any order.

        If a prompt turns out to fill the context, a server gives no answer and a local model an empty one.
        """


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

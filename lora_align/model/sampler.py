"""What draws answers to conversations: the base loaded here, or a server elsewhere (`endpoint`)."""

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
    """One answer to the prompt of that index, as text, and whether it came to its own end."""

    prompt: int
    number: int
    text: str
    ended: bool


class Sampler(Protocol):
    """Draws n answers to each prompt, some at a time and in any order."""

    def fits(self, prompt: Prompt) -> bool:
        """Whether the context leaves room for an answer, as far as can be told from here."""

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Every answer once; none to a prompt that turns out to fill the context."""


@dataclass(frozen=True)
class LocalSampler:
    """A model in this process, with whatever lies over it."""

    model: PreTrainedModel
    base: Base
    room: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))

    def fits(self, prompt: Prompt) -> bool:
        """The base knows its own length."""
        return len(self.base.chat.prompt_ids(prompt)) < self.base.max_length

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Batch by batch; see `sample`."""
        rows = [self.base.chat.prompt_ids(prompt) for prompt in prompts]
        for batch in sample(self.model, self.base, rows, n, sampling, self.room):
            texts = (text_of(self.base.chat.tokenizer, answer.tokens, special=False).strip() for answer in batch)
            yield [SampledText(a.prompt, a.number, text, a.ended) for a, text in zip(batch, texts, strict=True)]

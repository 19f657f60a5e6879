"""Prompts that the batcher reads for answers that will join the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache

from lora_align.serve.answer import Answer, Context


@dataclass
class Reading:
    """A prompt that is read for some answers. An interrupted answer continues: its own tokens are read as well."""

    answers: list[Answer]
    number: int  # of the request, in order of arrival
    caches: list[Cache] = field(default_factory=list)  # of the contexts that were read or are being read
    logits: list[Tensor] = field(default_factory=list)  # [v] after each context that was read completely
    left: list[int] = field(default_factory=list)  # tokens of the context that is being read

    @property
    def contexts(self) -> Sequence[Context]:
        return self.answers[0].contexts

    @property
    def complete(self) -> bool:
        return len(self.logits) == len(self.contexts)

    def ids(self, place: int) -> list[int]:
        """Return the tokens of a context."""
        return [*self.contexts[place].prompt, *self.answers[0].tokens]

    def forget(self) -> None:
        """Drop what was read."""
        self.caches, self.logits, self.left = [], [], []


def combined(logits: Tensor, contexts: Sequence[Context]) -> Tensor:
    """Return the logits [v] of an answer from those of its contexts [contexts, v]."""
    if len(contexts) == 1:
        return logits[0]
    shares = torch.tensor([context.share for context in contexts], device=logits.device)
    return (logits.float() * shares[:, None]).sum(0)

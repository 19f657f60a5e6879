"""Streaming of one answer for `chat`, with a key-value cache that later turns reuse."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lora_align.model.chat_format import text_of
from lora_align.model.kv_cache import growing_cache
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.token_sampling import sample_token


@dataclass
class PrefixCache:
    """Keys and values of the tokens so far. Call `forget` when the weights change."""

    cache: DynamicCache | None = None
    tokens: list[int] = field(default_factory=list)

    def forget(self) -> None:
        """Empty the cache."""
        self.cache, self.tokens = None, []


@torch.inference_mode()
def stream_tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    stops: frozenset[int],
    sampling: Sampling,
    prefix: PrefixCache | None = None,
) -> Iterator[int]:
    """Yield the tokens of an answer, without the stop token. Tokens cached in `prefix` are not computed again."""
    prefix = prefix if prefix is not None else PrefixCache()
    if prefix.cache is None or list(prompt[: len(prefix.tokens)]) != prefix.tokens or len(prefix.tokens) >= len(prompt):
        prefix.forget()
        prefix.cache = growing_cache(model)
    generator = torch.Generator(model.device)
    generator.manual_seed(sampling.seed if sampling.seed is not None else torch.seed())
    fresh = list(prompt[len(prefix.tokens) :])
    for _ in range(sampling.max_new_tokens):
        ids = torch.tensor([fresh], device=model.device)
        logits = model(input_ids=ids, past_key_values=prefix.cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        prefix.tokens += fresh
        token = sample_token(logits.float(), sampling, generator)
        if token in stops:
            return
        yield token
        fresh = [token]


@dataclass
class TextStream:
    """Decodes tokens into text as they arrive. A character appears only when all its bytes have arrived."""

    tokenizer: PreTrainedTokenizerBase
    context: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def add(self, token: int) -> str:
        """Add a token, and return the text that is complete now."""
        self.pending.append(token)
        text = self._text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.context, self.pending = self.pending[-8:], []
        return text

    def rest(self) -> str:
        """Return the text of the last tokens, complete or not."""
        text = self._text() if self.pending else ""
        self.pending = []
        return text

    def _text(self) -> str:
        before = text_of(self.tokenizer, self.context, special=False)
        return text_of(self.tokenizer, self.context + self.pending, special=False)[len(before) :]


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if text := stream.add(token):
            yield text
    if text := stream.rest():
        yield text

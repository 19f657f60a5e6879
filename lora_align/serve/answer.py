"""An answer in progress: its prompt and settings, and the text, stop sequences and log-probabilities of its tokens."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_align.model.streaming import TextStream
from lora_align.model.token_sampling import uniforms

LEAST = -9999.0  # a log-probability that stands for minus infinity, which JSON does not have


@dataclass(frozen=True)
class Context:
    """A row of the batch: a prompt, the weights of the adapters, and the share of its logits in the answer's."""

    prompt: tuple[int, ...]
    weights: Mapping[str, float]
    share: float = 1.0


@dataclass(frozen=True)
class TokenInfo:
    """A token with its log-probability, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """The next text of an answer. The last piece has a reason for the end ("stop" or "length"), or an error."""

    text: str = ""
    infos: Sequence[TokenInfo] = ()
    finish: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class AnswerSettings:
    """The sampling settings, the lengths and the stop sequences of answers."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...] = ()
    logprobs: int | None = None  # how many of the most likely tokens to return; None for no log-probabilities


@dataclass(eq=False)
class Answer:
    """One answer. The batcher calls `take` with each token, and `send` receives the pieces of text."""

    contexts: tuple[Context, ...]
    settings: AnswerSettings
    number: int  # among the answers to the request
    tokenizer: PreTrainedTokenizerBase
    send: Callable[[Piece], None]
    client: str = ""  # for a fair queue
    deadline: float = float("inf")  # of time.monotonic()
    tokens: list[int] = field(default_factory=list)
    stop_token: int | None = None
    ended: bool = False
    text: str = ""  # sent so far
    changed: bool = False  # whether its weights changed, so that its keys and values are those of no single policy

    def __post_init__(self) -> None:
        self._stream, self._held = TextStream(self.tokenizer), ""

    @cached_property
    def uniforms(self) -> Tensor:
        """Return a random number for each token. A waiting answer has none yet."""
        return uniforms(self.settings.seed, self.contexts[0].prompt, self.number, self.settings.max_tokens)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row at the end of the answer."""
        return max(len(context.prompt) for context in self.contexts) + self.settings.max_tokens

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Use other weights from the next token on."""
        self.contexts = tuple(replace(context, weights=weights) for context in self.contexts)
        self.changed = self.changed or bool(self.tokens)

    def take(self, token: int, logits: Tensor) -> None:
        """Add a sampled token, given the logits [v] it was sampled from."""
        if token in self.settings.stop_ids:
            self.stop_token = token
            self._end(self._held + self._stream.rest(), "stop")
            return
        self.tokens.append(token)
        infos = () if self.settings.logprobs is None else (self._info(token, logits),)
        full = len(self.tokens) == self.settings.max_tokens
        self._held += self._stream.add(token) + (self._stream.rest() if full else "")
        if (cut := self._stop_text()) is not None:
            self._end(self._held[:cut], "stop", infos)
        elif full:
            self._end(self._held, "length", infos)
        else:
            ready = len(self._held) - self._beginning_of_a_stop()
            text, self._held = self._held[:ready], self._held[ready:]
            if text or infos:
                self._send(Piece(text, infos))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.ended = True
        self.send(Piece(error=error))

    def expired(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def _end(self, text: str, why: str, infos: Sequence[TokenInfo] = ()) -> None:
        self.ended = True
        self._send(Piece(text, infos, why))

    def _send(self, piece: Piece) -> None:
        self.text += piece.text
        self.send(piece)

    def _stop_text(self) -> int | None:
        """Return where the first stop sequence begins in the text that was not sent yet."""
        places = [place for stop in self.settings.stop_texts if (place := self._held.find(stop)) >= 0]
        return min(places, default=None)

    def _beginning_of_a_stop(self) -> int:
        """Return how many of the last characters may be the beginning of a stop sequence."""
        return max(
            (
                length
                for stop in self.settings.stop_texts
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _info(self, token: int, logits: Tensor) -> TokenInfo:
        logprobs = torch.log_softmax(logits.float(), -1).nan_to_num(nan=LEAST, neginf=LEAST)
        top = logprobs.topk(min(self.settings.logprobs or 0, len(logprobs)))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenInfo(token, float(logprobs[token]), pairs)

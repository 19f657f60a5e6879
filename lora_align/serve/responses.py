"""The responses of the API, in OpenAI's form."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_align.model.chat_format import text_of
from lora_align.refusals import refuses
from lora_align.serve.answer import Answer, Piece, TokenInfo


@dataclass
class Completion:
    """The answers to one request, with the fields that all its responses share."""

    id: str
    model: str
    chat: bool
    tokenizer: PreTrainedTokenizerBase
    answers: Sequence[Answer]
    warnings: Sequence[str]
    with_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the response to a request that is not streamed, from the pieces of each answer."""
        choices = [self._choice(number, of) for number, of in enumerate(pieces)]
        return {
            **self._head("text_completion", "chat.completion"),
            "choices": choices,
            "usage": self.usage(),
        }

    def opening(self, number: int) -> dict[str, Any]:
        """Return the first chunk of an answer to a chat."""
        return self._chunk([{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece of a streamed answer."""
        choice: dict[str, Any] = {"index": number, "finish_reason": piece.finish or None}
        if piece.infos:
            choice["logprobs"] = self._logprobs(piece.infos)
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text or piece.infos else {}
        else:
            choice["text"] = piece.text
        return self._chunk([{**choice, **(self._end(number) if piece.finish else {})}])

    def closing(self) -> dict[str, Any]:
        """Return the last chunk, with the counts of tokens."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens. The prompts of one request are counted once each."""
        prompts = {id(answer.contexts[0].prompt): len(answer.contexts[0].prompt) for answer in self.answers}
        read, written = sum(prompts.values()), sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _head(self, text: str, chat: str) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self.id, "object": chat if self.chat else text, "created": self.created}
        return {**head, "model": self.model, **({"warnings": list(self.warnings)} if self.warnings else {})}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("text_completion", "chat.completion.chunk"), "choices": choices}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        infos = [info for piece in pieces for info in piece.infos]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        logprobs = self._logprobs(infos) if self.answers[number].settings.logprobs is not None else None
        return {"index": number, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish, **self._end(number)}

    def _end(self, number: int) -> dict[str, Any]:
        """Return the fields of a finished answer that OpenAI's API does not have."""
        answer = self.answers[number]
        ids = [*answer.tokens, *([] if answer.stop_token is None else [answer.stop_token])]
        return {
            **({"token_ids": ids} if self.with_ids else {}),
            **({"refused": refuses(answer.text)} if self.chat else {}),
        }

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any]:
        if self.chat:
            return {
                "content": [
                    {**self._token(info.token, info.logprob), "top_logprobs": [self._token(*one) for one in info.top]}
                    for info in infos
                ]
            }
        return {
            "tokens": [self._text(info.token) for info in infos],
            "token_logprobs": [info.logprob for info in infos],
            "top_logprobs": [self._by_text(info.top) for info in infos],
        }

    def _by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by text. Of tokens with equal texts, such as parts of characters, keep the first."""
        by_text: dict[str, float] = {}
        for token, logprob in top:
            by_text.setdefault(self._text(token), logprob)
        return by_text

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # the bytes of a part of a character are not known
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text(self, token: int) -> str:
        return text_of(self.tokenizer, [token])


def error_body(status: int, message: str, code: str = "") -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code or None}}


def event(data: Mapping[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()

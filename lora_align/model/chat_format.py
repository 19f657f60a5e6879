"""Conversations as token ids. Training and chat both come here, so a prefix always renders alike."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_align.data.rows import Message
from lora_align.errors import UserError

PRIVATE_USE = 0xF0000  # code points that stand for control tokens spelled out in somebody's text
PROBE = "\N{BALLOT BOX WITH CHECK}answer\N{BALLOT BOX WITH CHECK}"


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer, the template in force and its keyword arguments."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    template_kwargs: Mapping[str, Any]
    also_stops: frozenset[int] = frozenset()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far, up to where the assistant speaks."""
        return self._encode(*self._render(messages, generation=True))

    def answer_ids(self, prompt: Sequence[Message], answer: str) -> list[int]:
        """What the assistant then says, up to and including the token it stops with."""
        before = self.prompt_ids(prompt)
        whole = self._encode(*self._render([*prompt, Message("assistant", answer)], generation=False))
        if whole[: len(before)] == before:
            ids = whole[len(before) :]
        else:  # the template shows a finished turn differently (as with thoughts): say what chat would hear
            ids = self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0] + 1] if stops else [*ids, self._stop]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Any of these ends an answer: the template's own end of turn, and the base's."""
        return frozenset({self._stop, *self.also_stops})

    def fingerprint(self) -> str:
        """Names the vocabulary, the template and its arguments."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.template, sorted(self.template_kwargs.items())]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    @cached_property
    def _stop(self) -> int:
        """The first control token the template puts behind an answer, else the tokenizer's end of text."""
        text, _ = self._render([Message("user", "?"), Message("assistant", PROBE)], generation=False)
        ids = self.tokenizer(text.partition(PROBE)[2], add_special_tokens=False)["input_ids"]
        controls = [token for token in ids if token in self.tokenizer.all_special_ids]
        stop = controls[0] if controls else self.tokenizer.eos_token_id
        if stop is None:
            raise UserError("the base's tokenizer has no end-of-text token and its chat template ends no turn with one")
        return int(stop)

    def _render(self, messages: Sequence[Message], *, generation: bool) -> tuple[str, dict[str, str]]:
        """The template applied, and which private characters stand for which control tokens in user text."""
        controls = [t for t in self.tokenizer.all_special_tokens if any(t in m.content for m in messages)]
        stand_ins = {chr(PRIVATE_USE + i): token for i, token in enumerate(controls)}
        turns = [{"role": m.role, "content": _replaced(m.content, stand_ins)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as fault:
            raise UserError(f"base.chat_template fails on a conversation of {_roles(messages)}: {fault}") from fault
        return text, stand_ins

    def _encode(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Control tokens of the template become control ids; those in user text stay words."""
        ids: list[int] = []
        for part in re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]:
            literal = stand_ins.get(part)
            ids += self.tokenizer(
                part if literal is None else literal,
                add_special_tokens=False,
                split_special_tokens=literal is not None,
            )["input_ids"]
        return ids


def _replaced(text: str, stand_ins: Mapping[str, str]) -> str:
    for character, token in stand_ins.items():
        text = text.replace(token, character)
    return text


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(m.role for m in messages)

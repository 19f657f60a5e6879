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

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that may stand for control tokens in somebody's text
PROBE = "\N{BALLOT BOX WITH CHECK}answer\N{BALLOT BOX WITH CHECK}"
CONTROL_LIKE = re.compile(r"<\S+>|\[[A-Z_/]+\]")  # some tokenizers also add runs of spaces, which are only text
UNFIT = (ArithmeticError, MemoryError, RecursionError, SyntaxError)  # a template's, beside those Jinja names
OPENING = 12  # tokens that an error quotes
Answered = tuple[list[int], list[list[int]]]  # a prompt, and the answers to it
StandIns = Mapping[str, str]  # private character → the control token it stands for


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    """What token ids say, with the special ones among them or without."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer, the template in force and its keyword arguments."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    template_kwargs: Mapping[str, Any]
    also_stops: frozenset[int] = frozenset()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far, up to where the assistant speaks."""
        stand_ins = self._stand_ins(messages)
        return self._encode(self._render(messages, stand_ins, generation=True), stand_ins)

    def answer_ids(self, prompt: Sequence[Message], answer: str, *, ended: bool = True) -> list[int]:
        """What the assistant then says, up to and including the token it stops with, where it came to that."""
        ids = self.answered(prompt, [answer])[1][0]
        return ids if ended or len(ids) == 1 else ids[:-1]

    def answered(self, prompt: Sequence[Message], answers: Sequence[str]) -> Answered:
        """The conversation so far, and each answer to it as it would be said."""
        return self.answered_each([(prompt, answers)])[0]

    def answered_each(self, asked: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> list[Answered]:
        """The same of many, as tokenizers take many texts on all cores at once."""
        said = [[Message("assistant", answer) for answer in answers] for _, answers in asked]
        stand_ins = [self._stand_ins([*prompt, *last]) for (prompt, _), last in zip(asked, said, strict=True)]
        texts = [
            [self._render(prompt, hidden, generation=True)]
            + [self._render([*prompt, one], hidden, generation=False) for one in last]
            for (prompt, _), last, hidden in zip(asked, said, stand_ins, strict=True)
        ]
        plain = [text for some, hidden in zip(texts, stand_ins, strict=True) for text in some if not hidden]
        ids = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
        found = []
        for last, some, hidden in zip(said, texts, stand_ins, strict=True):
            before, *wholes = [self._encode(text, hidden) if hidden else next(ids) for text in some]
            answers = [self._answer(before, *of, hidden) for of in zip(last, wholes, strict=True)]
            found.append((before, answers))
        return found

    def _answer(self, before: list[int], said: Message, whole: list[int], stand_ins: StandIns) -> list[int]:
        """Behind the conversation so far, up to and including the token it stops with."""
        if whole[: len(before)] == before:
            ids = whole[len(before) :]
        else:  # the template shows a finished turn differently (as with thoughts): say what chat would hear
            ids = self._encode(self._hidden(said, stand_ins), stand_ins)
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0] + 1] if stops else [*ids, self._stop]

    @cached_property
    def longest_token(self) -> int:
        """Characters that a token can stand for, at most."""
        return max(map(len, self.tokenizer.get_vocab()))

    def opening(self, ids: Sequence[int]) -> str:
        """How a text begins, for an error to quote."""
        text = " ".join(text_of(self.tokenizer, ids[:OPENING]).split())
        return repr(text + (" …" if len(ids) > OPENING else ""))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Any of these ends an answer: the template's own end of turn, and the base's."""
        return frozenset({self._stop, *self.also_stops})

    def fingerprint(self) -> str:
        """Names the vocabulary, the template and its arguments."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.template, sorted(self.template_kwargs.items())]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    @cached_property
    def _controls(self) -> dict[str, int]:
        """Special tokens, and added ones that look like them (as <think>): text is cut at these before it is split."""
        added = {
            token.content: i
            for i, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or CONTROL_LIKE.fullmatch(token.content)
        }
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return added | dict(named)

    @cached_property
    def _stop(self) -> int:
        """The first control token the template puts behind an answer, else the tokenizer's end of text."""
        text = self._render([Message("user", "?"), Message("assistant", PROBE)], {}, generation=False)
        ids = self.tokenizer(text.partition(PROBE)[2], add_special_tokens=False)["input_ids"]
        controls = [token for token in ids if token in self._controls.values()]
        stop = controls[0] if controls else self.tokenizer.eos_token_id
        if stop is None:
            raise UserError("the base's tokenizer has no end-of-text token and its chat template ends no turn with one")
        return int(stop)

    @cached_property
    def _special(self) -> frozenset[str]:
        """The control tokens nobody may write. The others an assistant may: templates look for its </think>."""
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset({t.content for t in added if t.special} | set(self.tokenizer.all_special_tokens))

    def _stand_ins(self, messages: Sequence[Message]) -> StandIns:
        """A private character, unused so far, for each control token somebody has spelled out; longest first."""
        text = "".join(m.content for m in messages)
        spelled = sorted((token for token in self._controls if token in text), key=len, reverse=True)
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        return dict(zip(unused, spelled, strict=False))

    def _render(self, messages: Sequence[Message], stand_ins: StandIns, *, generation: bool) -> str:
        """The template applied, with the control tokens of its own and nobody else's."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": self._hidden(m, stand_ins)} for m in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self.template_kwargs,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, *UNFIT) as fault:
            roles = ", ".join(m.role for m in messages)
            why = f"{type(fault).__name__}: {fault}".removesuffix(": ")
            raise UserError(f"base.chat_template fails on a conversation of {roles}: {why}") from fault

    def _hidden(self, message: Message, stand_ins: StandIns) -> str:
        """A message's text with its control tokens replaced by their stand-ins."""
        text = message.content
        for character, token in stand_ins.items():
            if token in self._special or message.role != "assistant":
                text = text.replace(token, character)
        return text

    def _encode(self, text: str, stand_ins: StandIns) -> list[int]:
        """Control tokens of the template become control ids; those in user text stay words, in two halves."""
        ids: list[int] = []
        for part in re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]:
            literal = stand_ins.get(part)
            pieces = [part] if literal is None else [literal[:1], literal[1:]]
            for piece in filter(None, pieces):
                split = literal is not None
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        return ids

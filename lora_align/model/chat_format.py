"""Convert a conversation to token ids with the base's chat template, and find where an answer begins and ends.

Training and chat both use it, so they render a prefix alike.
"""

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

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that may stand in for control tokens in a message
PROBE = "\N{BALLOT BOX WITH CHECK}answer\N{BALLOT BOX WITH CHECK}"
CONTROL_LIKE = re.compile(r"<\S+>|\[[A-Z_/]+\]")  # other added tokens, such as runs of spaces, are plain text
TEMPLATE_FAULTS = (ArithmeticError, MemoryError, RecursionError, SyntaxError)  # besides Jinja's own errors
EXCERPT = 12  # tokens that an error quotes
PromptWithAnswers = tuple[list[int], list[list[int]]]
StandIns = Mapping[str, str]  # private character → the control token it stands for


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    """Decode token ids to text, with or without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer, a chat template and the template's keyword arguments."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    template_kwargs: Mapping[str, Any]
    also_stops: frozenset[int] = frozenset()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, with the generation prompt at its end."""
        stand_ins = self._stand_ins(messages)
        return self._encode(self._render(messages, stand_ins, generation=True), stand_ins)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation, with the generation prompt at its end."""
        return self._render(messages, {}, generation=True)

    def answer_ids(self, prompt: Sequence[Message], answer: str) -> list[int]:
        """Return the ids of the answer to `prompt`, up to and including its stop token."""
        return self.answered(prompt, [answer])[1][0]

    def answered(self, prompt: Sequence[Message], answers: Sequence[str]) -> PromptWithAnswers:
        """Return the ids of the prompt, and of each answer up to and including its stop token."""
        return self.answered_each([(prompt, answers)])[0]

    def answered_each(self, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> list[PromptWithAnswers]:
        """Return `answered` for many prompts. A fast tokenizer processes the batch on all cores."""
        messages = [[Message("assistant", answer) for answer in answers] for _, answers in rows]
        replaced = [self._stand_ins([*prompt, *last]) for (prompt, _), last in zip(rows, messages, strict=True)]
        texts = [
            [self._render(prompt, stand_ins, generation=True)]
            + [self._render([*prompt, one], stand_ins, generation=False) for one in last]
            for (prompt, _), last, stand_ins in zip(rows, messages, replaced, strict=True)
        ]
        plain = [text for some, stand_ins in zip(texts, replaced, strict=True) for text in some if not stand_ins]
        ids = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
        encoded = []
        for last, some, stand_ins in zip(messages, texts, replaced, strict=True):
            before, *wholes = [self._encode(text, stand_ins) if stand_ins else next(ids) for text in some]
            answers = [self._answer(before, *of, stand_ins) for of in zip(last, wholes, strict=True)]
            encoded.append((before, answers))
        return encoded

    def _answer(self, before: list[int], answer: Message, whole: list[int], stand_ins: StandIns) -> list[int]:
        """Return the ids of the answer, up to and including its stop token.

        `before` is the prompt's ids, `whole` the ids of prompt and answer rendered together.
        """
        if whole[: len(before)] == before:
            ids = whole[len(before) :]
        else:  # the template renders a finished turn differently, for example without thoughts: use the raw answer
            ids = self._encode(self._with_stand_ins(answer, stand_ins), stand_ins)
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0] + 1] if stops else [*ids, self._stop]

    @cached_property
    def takes_system(self) -> bool:
        """Return whether the template renders a system message. Some refuse it, others leave it out."""
        try:
            return PROBE in self.render([Message("system", PROBE), Message("user", "?")])
        except UserError:
            return False

    @cached_property
    def longest_token(self) -> int:
        """Return the length of the longest token, in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def excerpt(self, ids: Sequence[int]) -> str:
        """Return the beginning of a text, to quote in an error."""
        text = " ".join(text_of(self.tokenizer, ids[:EXCERPT]).split())
        return repr(text + (" …" if len(ids) > EXCERPT else ""))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end an answer: the template's end of turn, and the stop tokens of the base."""
        return frozenset({self._stop, *self.also_stops})

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary, the template and its arguments."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.template, sorted(self.template_kwargs.items())]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    @cached_property
    def _controls(self) -> dict[str, int]:
        """Return the special tokens, and added tokens that look like them (such as <think>), with their ids."""
        added = {
            token.content: i
            for i, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or CONTROL_LIKE.fullmatch(token.content)
        }
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return added | dict(named)

    @cached_property
    def _stop(self) -> int:
        """Return the first control token that the template puts after an answer, or else the end of text."""
        text = self._render([Message("user", "?"), Message("assistant", PROBE)], {}, generation=False)
        ids = self.tokenizer(text.partition(PROBE)[2], add_special_tokens=False)["input_ids"]
        controls = [token for token in ids if token in self._controls.values()]
        stop = controls[0] if controls else self.tokenizer.eos_token_id
        if stop is None:
            raise UserError(
                "the base's tokenizer has no end-of-text token and its chat template ends a turn without one; "
                "give a template in the recipe: base.chat_template"
            )
        return int(stop)

    @cached_property
    def _special(self) -> frozenset[str]:
        """Return the control tokens that are always plain text in a message.

        The other control tokens are allowed in assistant messages, because templates look for </think> there.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset({t.content for t in added if t.special} | set(self.tokenizer.all_special_tokens))

    def _stand_ins(self, messages: Sequence[Message]) -> StandIns:
        """Assign an unused private character to each control token that a message spells out, longest first."""
        text = "".join(m.content for m in messages)
        spelled = sorted((token for token in self._controls if token in text), key=len, reverse=True)
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        return dict(zip(unused, spelled, strict=False))

    def _render(self, messages: Sequence[Message], stand_ins: StandIns, *, generation: bool) -> str:
        """Apply the template. Control tokens in messages are replaced by their stand-ins."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": self._with_stand_ins(m, stand_ins)} for m in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self.template_kwargs,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, *TEMPLATE_FAULTS) as fault:
            roles = ", ".join(m.role for m in messages)
            why = f"{type(fault).__name__}: {fault}".removesuffix(": ")
            opening = f" that begins {messages[0].content[:40]!r}" if messages else ""
            raise UserError(f"the chat template fails on a conversation of {roles}{opening}: {why}") from fault

    def _with_stand_ins(self, message: Message, stand_ins: StandIns) -> str:
        """Return a message's text with its control tokens replaced by their stand-ins."""
        text = message.content
        for character, token in stand_ins.items():
            if token in self._special or message.role != "assistant":
                text = text.replace(token, character)
        return text

    def _encode(self, text: str, stand_ins: StandIns) -> list[int]:
        """Tokenise a rendered text. The template's control tokens become control ids; a stand-in's token stays text.

        The text of such a token is tokenised in two halves, so that it does not become the control id.
        """
        ids: list[int] = []
        for part in re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]:
            literal = stand_ins.get(part)
            pieces = [part] if literal is None else [literal[:1], literal[1:]]
            for piece in filter(None, pieces):
                split = literal is not None
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        return ids

"""Write a chat template in Ollama's language, Go's text/template, from how the base's own template joins messages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.model.chat_format import ChatFormat

MARK = "\N{BALLOT BOX WITH CHECK}"  # around the number of a probed message, which is its content
TURNS = ("user", "assistant", "user")
PROBES = (("user",), TURNS, (*TURNS, "assistant", "user"))  # with and without a system message before them
TEMPLATE = """\
{{- $before := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}%(system)s
{{- else if eq .Role "user" }}
{{- if eq $before "system" }}%(system_to_user)s
{{- else if $before }}%(assistant_to_user)s
{{- else }}%(to_user)s
{{- end }}{{ .Content }}
{{- else if eq .Role "assistant" }}%(user_to_assistant)s{{ .Content }}
{{- end }}
{{- $before = .Role }}
{{- end }}%(end)s"""


@dataclass(frozen=True)
class Joints:
    """The texts around the messages of a conversation."""

    to_system: str | None  # None: the template refuses system messages, and Ollama shall leave them out
    system_to_user: str
    to_user: str
    user_to_assistant: str
    assistant_to_user: str
    end: str

    @classmethod
    def of(cls, chat: ChatFormat) -> "Joints":
        """Find the texts by rendering marked messages. Refuse a template that joins other conversations differently."""
        to_user, *others = _around(chat, TURNS)
        try:
            to_system, system_to_user, _ = _around(chat, ("system", "user"))
        except UserError:
            to_system, system_to_user = None, to_user
        joints = cls(to_system, system_to_user, to_user, *others)
        for roles in PROBES:
            for opening in ((), ("system",)) if to_system is not None else ((),):
                if joints.around((*opening, *roles)) != _around(chat, (*opening, *roles)):
                    raise UserError(f"it joins the messages of {', '.join((*opening, *roles))} in another way")
        return joints

    def around(self, roles: Sequence[str]) -> list[str]:
        """Return the texts around messages with these roles."""
        texts = {
            ("", "system"): self.to_system or "",
            ("system", "user"): self.system_to_user,
            ("", "user"): self.to_user,
            ("user", "assistant"): self.user_to_assistant,
            ("assistant", "user"): self.assistant_to_user,
        }
        return [*(texts[pair] for pair in zip(("", *roles), roles, strict=False)), self.end]

    def template(self) -> str:
        """Return Ollama's template."""
        texts = {name: _go(text or "") for name, text in vars(self).items()}
        system = "" if self.to_system is None else texts["to_system"] + "{{ .Content }}"
        return TEMPLATE % {**texts, "system": system}


def _around(chat: ChatFormat, roles: Sequence[str]) -> list[str]:
    """Return the texts around the contents of a rendered conversation, without a first token that Ollama adds."""
    marks = [f"{MARK}{number}{MARK}" for number in range(len(roles))]
    rest = chat.render([Message(role, mark) for role, mark in zip(roles, marks, strict=True)])
    first = chat.tokenizer.bos_token_id
    if first is not None and first in chat.tokenizer(MARK)["input_ids"]:
        rest = rest.removeprefix(chat.tokenizer.bos_token)
    texts = []
    for mark in marks:
        text, found, rest = rest.partition(mark)
        if not found:
            raise UserError(f"it changes the messages of {', '.join(roles)}")
        texts.append(text)
    return [*texts, rest]


def _go(text: str) -> str:
    """Return an action that prints a text. Go's trim markers would cut white space of a bare text."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

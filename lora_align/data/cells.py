"""What stands in the cells of a row: text, turns, labels, numbers.

A ValueError says what is wrong; whoever reads the row says where.
"""

import math
from typing import Any

from lora_align.data.rows import Message, Prompt
from lora_align.data.sources import Row

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def text(value: Any) -> str:
    """Text, and nothing else."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    value.encode("utf-8")  # a lone surrogate is a ValueError here, not a crash in the tokenizer
    return value


def turn(value: Row) -> Message:
    """One turn, in TRL's words or in ShareGPT's."""
    if "role" in value:
        return Message(text(value["role"]), text(value["content"]))
    role = text(value["from"])
    if role not in SHAREGPT_ROLES:
        raise ValueError(f"unknown speaker {role!r}")
    return Message(SHAREGPT_ROLES[role], text(value["value"]))


def messages(value: Any) -> tuple[Message, ...]:
    """A list of turns."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected text or a list of turns, found {type(value).__name__}")
    return tuple(turn(one) for one in value)


def prompt(value: Any) -> tuple[Message, ...]:
    """A list of turns, or what a user says."""
    return (Message("user", text(value)),) if isinstance(value, str) else messages(value)


def request(row: Row, column: str = "prompt") -> tuple[Message, ...]:
    """What is asked, behind the system message where a column holds one."""
    return behind_system(row, prompt(row[column]))


def behind_system(row: Row, turns: Prompt) -> tuple[Message, ...]:
    """Turns, with the system message that another column holds, unless they begin with one."""
    return (*turns,) if turns[:1] and turns[0].role == "system" else (*system(row), *turns)


def answer(message: Message) -> str:
    """What the assistant says."""
    if message.role != "assistant":
        raise ValueError(f"the last turn is the {message.role}'s, not the assistant's")
    return message.content


def up_to_answer(turns: Prompt) -> Prompt:
    """Without the answer at their end, if there is one."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def ending_in_answer(turns: Prompt) -> tuple[Message, ...]:
    """The same turns, if the last is an answer."""
    answer(turns[-1])
    return (*turns,)


def system(row: Row) -> tuple[Message, ...]:
    """The system message that a column of that name holds, if any."""
    return (Message("system", text(row["system"])),) if row.get("system") else ()


def label(value: Any, name: str) -> int | None:
    """Which of two answers is preferred; nothing where neither is."""
    if isinstance(value, str):  # as CSV has it
        value = number(value) if is_number(value) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value in (0, 1):
        return int(value)
    raise ValueError(f"{name} is {value!r}; expected 0, 1 or nothing for a tie")


def ratings(row: Row, first: str, second: str) -> dict[str, tuple[float, float]]:
    """Numbers that stand once for each answer, as in score_chosen and score_rejected; nan where one is missing."""
    prefix, suffix = first.split("{}")
    names = [
        key[len(prefix) : len(key) - len(suffix)] for key in row if key.startswith(prefix) and key.endswith(suffix)
    ]
    found = {name: (row[first.format(name)], row.get(second.format(name), "no such column")) for name in names if name}
    return {name: (number(a), number(b)) for name, (a, b) in found.items() if is_number(a) and is_number(b)}


def is_number(value: Any) -> bool:
    """A number, its text, or nothing at all."""
    if isinstance(value, str):
        try:
            float(value.strip() or "nan")
        except ValueError:
            return False
        return True
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def number(value: Any) -> float:
    """Of what is one; nan of nothing at all."""
    if isinstance(value, str):
        value = value.strip() or "nan"
    return math.nan if value is None else float(value)

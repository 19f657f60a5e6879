"""Readers for single cells: text, turns, labels, numbers.

Each reader raises a ValueError that names the column. The caller adds the place of the row.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_align.data.rows import Message, Prompt, Row
from lora_align.rankers import Winner

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
WINNERS: Mapping[Winner, int | None] = {Winner.first: 0, Winner.second: 1, Winner.tie: None}
EXACT = 2**53  # a float holds every whole number up to this one exactly


def kind(value: Any) -> str:
    """Return the type of a cell in a data file's terms: text, a number, a list, an object, null, true, false."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), "not text")


def text(value: Any, column: str) -> str:
    """Return the cell's text; raise if it is not text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {kind(value)}; expected text")
    try:
        value.encode("utf-8")  # an unpaired surrogate would crash the tokenizer
    except UnicodeEncodeError as fault:
        raise ValueError(f"{column} holds an unpaired surrogate at position {fault.start}; expected text") from None
    return value


def record(value: Any, column: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{column} is {kind(value)}; expected an object")
    return value


def turn(value: Any, column: str) -> Message:
    """Read one turn in TRL's keys (role, content) or in ShareGPT's (from, value)."""
    fields = record(value, f"a turn of {column}")
    if "role" in fields and "content" in fields:
        return Message(text(fields["role"], f"{column}: role"), text(fields["content"], f"{column}: content"))
    if "from" not in fields or "value" not in fields:
        raise ValueError(f"a turn of {column} has neither `role` and `content` nor `from` and `value`")
    role = text(fields["from"], f"{column}: from")
    if role not in SHAREGPT_ROLES:
        raise ValueError(f"{column}: unknown speaker {role!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    return Message(SHAREGPT_ROLES[role], text(fields["value"], f"{column}: value"))


def messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {kind(value)}; expected text or a list of turns")
    if not value:
        raise ValueError(f"{column} is an empty list of turns")
    return tuple(turn(one, column) for one in value)


def prompt(value: Any, column: str) -> tuple[Message, ...]:
    """Read a list of turns; text alone is one user turn."""
    return (Message("user", text(value, column)),) if isinstance(value, str) else messages(value, column)


def prompt_with_context(row: Row, column: str = "prompt") -> tuple[Message, ...]:
    """Read the prompt. If it is text, Alpaca's `history` turns come before it, and the text of `input` is appended."""
    if not isinstance(row[column], str):
        return with_system(row, prompt(row[column], column))
    question = text(row[column], column)
    more = "" if row.get("input") is None else text(row["input"], "input")
    if column != "input" and more != question:
        question = "\n\n".join(filter(None, (question, more)))
    return (*system(row), *history(row), Message("user", question))


def history(row: Row) -> tuple[Message, ...]:
    """Read Alpaca's `history` column: earlier turns as a list of [question, answer]."""
    earlier = row.get("history") or ()
    if not isinstance(earlier, list | tuple) or not all(
        isinstance(both, list | tuple) and len(both) == 2 for both in earlier
    ):
        raise ValueError("history: expected a list of [question, answer] pairs")
    return tuple(
        Message(role, text(content, "history"))
        for both in earlier
        for role, content in zip(("user", "assistant"), both, strict=True)
    )


def with_system(row: Row, turns: Prompt) -> tuple[Message, ...]:
    """Put the `system` column's message before the turns, unless they begin with a system message."""
    return (*turns,) if turns[:1] and turns[0].role == "system" else (*system(row), *turns)


def answer(message: Message, column: str) -> str:
    """Return the assistant's text; raise if the message has another role."""
    if message.role != "assistant":
        raise ValueError(f"{column}: the last turn is the {message.role}'s, not the assistant's")
    return message.content


def without_answer(turns: Prompt) -> Prompt:
    """Return the turns without the assistant's answer at the end, if there is one."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def ending_in_answer(turns: Prompt, column: str) -> tuple[Message, ...]:
    """Return the turns; raise if the last is not the assistant's."""
    answer(turns[-1], column)
    return (*turns,)


def system(row: Row) -> tuple[Message, ...]:
    """Read the `system` column as a message; return nothing if the row has none."""
    return (Message("system", text(row["system"], "system")),) if row.get("system") else ()


def label(value: Any, first: int) -> int | str | None:
    """Return the index of the answer that a label prefers; None for a tie.

    `first` is the number that labels give the first answer. An unknown label is returned as text; the caller decides
    what it means.
    """
    if isinstance(value, Winner):
        return WINNERS[value]
    key = label_text(value)
    return WINNERS[winner] if (winner := {"": Winner.tie, **numbered(first)}.get(key)) else key


def numbered(first: int) -> dict[str, Winner]:
    """Return the meaning of labels that number the answers from `first`; if `first` is 1, label 0 is a tie."""
    return {str(first): Winner.first, str(first + 1): Winner.second} | ({"0": Winner.tie} if first else {})


def label_text(value: Any) -> str:
    """Return a label as a key of the recipe's `labels`: "1" for 1.0 and for "1.0", "" for a missing label."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple | dict):
        return kind(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    key = str(value).strip()
    if not key or not is_number(key) or not abs(as_number := float(key)) < EXACT:
        return "" if key.lower() == "nan" else key
    return str(int(as_number)) if as_number.is_integer() else key


def ratings(row: Row, first: str, second: str) -> dict[str, tuple[float, float]]:
    """Return each rating that has one column per answer, such as score_chosen and score_rejected; nan if empty.

    `first` and `second` are column names with {} for the rating's name.
    """
    prefix, suffix = first.split("{}")
    names = [
        key[len(prefix) : len(key) - len(suffix)] for key in row if key.startswith(prefix) and key.endswith(suffix)
    ]
    pairs = {name: (first.format(name), second.format(name)) for name in names if name}
    numeric = {name: both for name, both in pairs.items() if all(one in row and is_number(row[one]) for one in both)}
    return {name: (number(row[a], a), number(row[b], b)) for name, (a, b) in numeric.items()}


def is_number(value: Any) -> bool:
    """Return whether a cell holds a number, a number as text, or nothing."""
    if isinstance(value, str):
        try:
            float(value.strip() or "nan")
        except ValueError:
            return False
        return True
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def number(value: Any, column: str) -> float:
    """Read a number; return nan for an empty cell."""
    if not is_number(value):
        raise ValueError(f"{column} is {kind(value)}; expected a number")
    if isinstance(value, str):
        value = value.strip() or "nan"
    try:
        result = math.nan if value is None else float(value)
    except OverflowError:
        result = math.inf
    if math.isinf(result):
        raise ValueError(f"{column} is infinite or too large")
    return result

"""What stands in the cells of a row: text, turns, labels, numbers.

A ValueError names the column and says what is wrong; whoever reads the row says where.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_align.data.rows import Message, Prompt
from lora_align.data.sources import Row
from lora_align.rankers import Winner

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
WINNERS: Mapping[Winner, int | None] = {Winner.first: 0, Winner.second: 1, Winner.tie: None}
EXACT = 2**53  # whole numbers that a float holds exactly


def kind(value: Any) -> str:
    """Name what a cell holds in the words of a data file."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object"}
    return next((name for of, name in names.items() if isinstance(value, of)), "no text")


def text(value: Any, column: str) -> str:
    """Return text, and refuse anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {kind(value)}; expected text")
    try:
        value.encode("utf-8")  # a crash in the tokenizer otherwise
    except UnicodeEncodeError as fault:
        raise ValueError(f"{column} holds half a character at position {fault.start}: surrogates not allowed") from None
    return value


def record(value: Any, column: str) -> Mapping[str, Any]:
    """Return an object, and refuse anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{column} is {kind(value)}; expected an object")
    return value


def turn(value: Any, column: str) -> Message:
    """Read one turn, in TRL's words or in ShareGPT's."""
    said = record(value, f"a turn of {column}")
    if "role" in said:
        return Message(text(said["role"], f"{column}: role"), text(said.get("content"), f"{column}: content"))
    role = text(said.get("from"), f"{column}: from")
    if role not in SHAREGPT_ROLES:
        raise ValueError(f"{column}: unknown speaker {role!r}")
    return Message(SHAREGPT_ROLES[role], text(said.get("value"), f"{column}: value"))


def messages(value: Any, column: str) -> tuple[Message, ...]:
    """Read a list of turns."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {kind(value)}; expected text or a list of turns")
    if not value:
        raise ValueError(f"{column} is an empty list of turns")
    return tuple(turn(one, column) for one in value)


def prompt(value: Any, column: str) -> tuple[Message, ...]:
    """Read a list of turns, or what a user says."""
    return (Message("user", text(value, column)),) if isinstance(value, str) else messages(value, column)


def request(row: Row, column: str = "prompt") -> tuple[Message, ...]:
    """Read what is asked. Text is followed by `input`, as Alpaca joins them, and preceded by the turns of `history`."""
    if not isinstance(row[column], str):
        return behind_system(row, prompt(row[column], column))
    asked = text(row[column], column)
    if column != "input" and (more := text(row.get("input") or "", "input")) != asked:
        asked = "\n\n".join(filter(None, (asked, more)))
    return (*system(row), *history(row), Message("user", asked))


def history(row: Row) -> tuple[Message, ...]:
    """Read the turns that Alpaca's form has before the instruction: a list of questions with their answers."""
    before = row.get("history") or ()
    if not isinstance(before, list | tuple) or not all(
        isinstance(both, list | tuple) and len(both) == 2 for both in before
    ):
        raise ValueError("history is no list of [question, answer]")
    return tuple(
        Message(role, text(said, "history"))
        for both in before
        for role, said in zip(("user", "assistant"), both, strict=True)
    )


def behind_system(row: Row, turns: Prompt) -> tuple[Message, ...]:
    """Put the system message that another column holds before turns, unless they begin with one."""
    return (*turns,) if turns[:1] and turns[0].role == "system" else (*system(row), *turns)


def answer(message: Message, column: str) -> str:
    """Return what the assistant says."""
    if message.role != "assistant":
        raise ValueError(f"{column}: the last turn is the {message.role}'s, not the assistant's")
    return message.content


def up_to_answer(turns: Prompt) -> Prompt:
    """Without the answer at their end, if there is one."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def ending_in_answer(turns: Prompt, column: str) -> tuple[Message, ...]:
    """The same turns, if the last is an answer."""
    answer(turns[-1], column)
    return (*turns,)


def system(row: Row) -> tuple[Message, ...]:
    """Read the system message that a column of that name holds, if any."""
    return (Message("system", text(row["system"], "system")),) if row.get("system") else ()


def label(value: Any, first: int) -> int | str | None:
    """Return which of two answers a label prefers, the first of which has the number `first`; None for a tie.

    A value that means neither is returned as it is written: what is wrong then is the column, not the row.
    """
    if isinstance(value, Winner):
        return WINNERS[value]
    written = label_text(value)
    return WINNERS[winner] if (winner := {"": Winner.tie, **numbered(first)}.get(written)) else written


def numbered(first: int) -> dict[str, Winner]:
    """Return what labels mean that number the answers from `first`; where that is 1, 0 is a tie."""
    return {str(first): Winner.first, str(first + 1): Winner.second} | ({"0": Winner.tie} if first else {})


def label_text(value: Any) -> str:
    """Write a label as a key of a `labels` table: 1 for 1.0 and for "1.0", nothing where there is none."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple | dict):
        return kind(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    written = str(value).strip()
    if not written or not is_number(written) or not abs(as_number := float(written)) < EXACT:
        return "" if written.lower() == "nan" else written
    return str(int(as_number)) if as_number.is_integer() else written


def ratings(row: Row, first: str, second: str) -> dict[str, tuple[float, float]]:
    """Read numbers that stand once for each answer, as in score_chosen and score_rejected; nan for a missing one."""
    prefix, suffix = first.split("{}")
    names = [
        key[len(prefix) : len(key) - len(suffix)] for key in row if key.startswith(prefix) and key.endswith(suffix)
    ]
    pairs = {name: (first.format(name), second.format(name)) for name in names if name}
    found = {name: both for name, both in pairs.items() if all(one in row and is_number(row[one]) for one in both)}
    return {name: (number(row[a], a), number(row[b], b)) for name, (a, b) in found.items()}


def is_number(value: Any) -> bool:
    """A number, its text, or nothing at all."""
    if isinstance(value, str):
        try:
            float(value.strip() or "nan")
        except ValueError:
            return False
        return True
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def number(value: Any, column: str) -> float:
    """Read a number; nan where there is nothing at all."""
    if not is_number(value):
        raise ValueError(f"{column} is {kind(value)}; expected a number")
    if isinstance(value, str):
        value = value.strip() or "nan"
    try:
        found = math.nan if value is None else float(value)
    except OverflowError:
        found = math.inf
    if math.isinf(found):
        raise ValueError(f"{column} is too large a number")
    return found

"""One function for each form rows come in, into the shapes everything here works on."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from lora_align.data.rows import Comparison, Conversation, Message, Prompt, Rated
from lora_align.data.sources import Row
from lora_align.errors import UserError

Shape = TypeVar("Shape", Comparison, list[Comparison], Conversation, list[Rated], Prompt)
Forms = list[tuple[frozenset[str], Callable[[Row], Shape]]]  # columns → the function that reads such rows
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TRUTHS = {"true": True, "1": True, "false": False, "0": False}  # as Parquet and CSV have them
UNREAD = ("query", "input", "context")  # columns that may be what is asked
TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")  # of an HH-RLHF transcript


def comparisons(row: Row, where: str) -> list[Comparison]:
    """One row as a comparison; of several answers, each with each."""
    if "completions" in row:
        answers = rated(row, where)
        return [_between(first, second) for first, second in itertools.combinations(answers, 2)]
    return [_first_form(_COMPARISONS, row, where, "pair of answers")]


def conversation(row: Row, where: str) -> Conversation:
    """One row as a conversation that ends with an answer."""
    return _first_form(_CONVERSATIONS, row, where, "conversation")


def rated(row: Row, where: str) -> list[Rated]:
    """The rated answers of one row."""
    return _first_form(_RATED, row, where, "rated answer")


def prompt(row: Row, where: str) -> Prompt:
    """What one row asks: its turns up to the answer, if it has one."""
    return _first_form(_PROMPTS, row, where, "prompt")


def answered(row: Row, where: str) -> list[Rated]:
    """Every answer in one row behind its prompt, rated or not."""
    if any(columns <= row.keys() for columns, _ in _RATED):
        return rated(row, where)
    *turns, last = conversation(row, where).messages
    return [Rated(tuple(turns), last.content, {})]


def _first_form(forms: Forms[Shape], row: Row, where: str, what: str) -> Shape:
    """Read by the first form whose columns are all there; a fault of the row is told with its place."""
    for columns, read in forms:
        if columns <= row.keys():
            try:
                return read(row)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as fault:
                raise UserError(f"{where}: {fault}") from fault
    missing = min((sorted(columns - row.keys()) for columns, _ in forms), key=len)  # of the form that is nearest
    raise UserError(
        f"{where}: no {what} in columns {', '.join(map(str, row))} (nearest: with {' and '.join(missing)}); "
        "`columns` names them otherwise, skip_bad = true counts such rows"
    )


# --- forms of comparison ---


def _pku(row: Row) -> Comparison:
    """PKU-SafeRLHF: two responses, and a column for each question asked about them."""
    labels = {name: row[name] for name in row if name.endswith("_response_id")}
    if "label" in row:
        labels = {"label": row["label"], **labels}
    return Comparison(
        prompt=_request(row),
        answers=(_text(row["response_0"]), _text(row["response_1"])),
        labels={name: _label(value, name) for name, value in labels.items()},
        ratings=_ratings(row, "{}_0", "{}_1"),
        safe=_safe(row),
    )


def _safe(row: Row) -> tuple[bool, bool] | None:
    """PKU-SafeRLHF's own word on each response."""
    first, second = (TRUTHS.get(str(row.get(f"is_response_{side}_safe")).lower()) for side in (0, 1))
    return None if first is None or second is None else (first, second)


def _strengths(row: Row, prompt: str, first: str, second: str, strength: str) -> Comparison:
    """HelpSteer2 and 3: a number from -3, the first is much better, to 3, the second is."""
    value = float(row[strength])
    if not -3 <= value <= 3:
        raise ValueError(f"{strength} is {value:g}; expected -3 to 3")
    winner = None if value == 0 else int(value > 0)
    answers = (_text(row[first]), _text(row[second]))
    return Comparison(_request(row, prompt), answers, {strength: winner}, {strength: (0.0, value)})


def _helpsteer2_pair(row: Row) -> Comparison:
    return _strengths(row, "prompt", "response_1", "response_2", "preference_strength")


def _helpsteer3(row: Row) -> Comparison:
    return _strengths(row, "context", "response1", "response2", "overall_preference")


def _between(first: Rated, second: Rated) -> Comparison:
    """Two answers of several to one prompt; what both were rated for can rank them."""
    shared = [name for name in first.ratings if name in second.ratings]
    ratings = {name: (first.ratings[name], second.ratings[name]) for name in shared}
    return Comparison(first.prompt, (first.answer, second.answer), {}, ratings)


def _transcripts(row: Row) -> Comparison:
    """HH-RLHF: two whole conversations as text, the same but for the last answer."""
    turns = [_transcript(_text(row[side])) for side in ("chosen", "rejected")]
    if turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    return Comparison(turns[0][:-1], (_answer(turns[0][-1]), _answer(turns[1][-1])), {"label": 0})


def _transcript(text: str) -> tuple[Message, ...]:
    start, *parts = TURN.split(text)
    if start.strip() or not parts:
        raise ValueError(r"not a transcript: it does not begin with \n\nHuman:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _chosen_rejected(row: Row) -> Comparison:
    """TRL's preference form, standard or conversational, with the prompt apart or shared by both."""
    chosen, rejected = row["chosen"], row["rejected"]
    ratings = {**_ratings(row, "chosen_{}", "rejected_{}"), **_ratings(row, "{}_chosen", "{}_rejected")}
    asked = next((name for name in ("prompt", "question") if name in row), "")  # question: PsychoCounsel-Preference
    if isinstance(chosen, str) and asked:
        return Comparison(_request(row, asked), (_text(chosen), _text(rejected)), {"label": 0}, ratings)
    if isinstance(chosen, str) and TURN.match(chosen):
        return _transcripts(row)
    if isinstance(chosen, str):
        if unread := [name for name in UNREAD if row.get(name)]:
            raise ValueError(f"no prompt column, but {unread[0]!r}: is it one? columns = {{ prompt = {unread[0]!r} }}")
        shared = _beginning(_text(chosen), _text(rejected))
        answers = (chosen.removeprefix(shared).lstrip(), rejected.removeprefix(shared).lstrip())
        return Comparison(_system(row) + _prompt(shared), answers, {"label": 0}, ratings)
    turns = [_messages(chosen), _messages(rejected)]
    prompt = _request(row) if "prompt" in row else _behind_system(row, turns[0][:-1])
    if "prompt" not in row and turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    answers = (_answer(turns[0][-1]), _answer(turns[1][-1]))
    if "prompt" in row and any(len(t) > 1 and t[:-1] not in (prompt, _prompt(row["prompt"])) for t in turns):
        raise ValueError("chosen and rejected hold more than one turn beside the prompt column")
    return Comparison(prompt, answers, {"label": 0}, ratings)


def _beginning(one: str, other: str) -> str:
    """What two texts share, to the end of a word: the prompt, where it has no column."""
    alike = itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))
    shared = "".join(letter for letter, _ in alike)
    if not one[len(shared) :][:1].isspace() or not other[len(shared) :][:1].isspace():  # within a word
        shared = re.sub(r"\S+$", "", shared)
    shared = shared.rstrip()
    if not shared:
        raise ValueError("chosen and rejected are plain text that begins unlike, and there is no prompt column")
    return shared


def _alpaca_pair(row: Row) -> Comparison:
    """Alpaca's columns, with two answers to choose from; where they hold whole conversations, those."""
    if not isinstance(row["chosen"], str):
        return _chosen_rejected(row)
    answers = (_text(row["chosen"]), _text(row["rejected"]))
    return Comparison(_alpaca_asked(row), answers, {"label": 0}, _ratings(row, "{}_chosen", "{}_rejected"))


def _sharegpt_pair(row: Row) -> Comparison:
    """ShareGPT with two last turns: conversations, chosen, rejected."""
    answers = (_answer(_turn(row["chosen"])), _answer(_turn(row["rejected"])))
    ratings = _ratings(row, "{}_chosen", "{}_rejected")
    return Comparison(_system(row) + _messages(row["conversations"]), answers, {"label": 0}, ratings)


_COMPARISONS: Forms[Comparison] = [
    (frozenset({"prompt", "response_0", "response_1"}), _pku),
    (frozenset({"prompt", "response_1", "response_2", "preference_strength"}), _helpsteer2_pair),
    (frozenset({"context", "response1", "response2", "overall_preference"}), _helpsteer3),
    (frozenset({"conversations", "chosen", "rejected"}), _sharegpt_pair),
    (frozenset({"instruction", "chosen", "rejected"}), _alpaca_pair),
    (frozenset({"chosen", "rejected"}), _chosen_rejected),
]

# --- forms of conversation ---


def _chat_messages(row: Row) -> Conversation:
    return Conversation(_ending_in_answer(_messages(row["messages"])))


def _sharegpt(row: Row) -> Conversation:
    return Conversation(_ending_in_answer(_system(row) + _messages(row["conversations"])))


def _alpaca(row: Row) -> Conversation:
    request = "\n\n".join(filter(None, (_text(row["instruction"]), _text(row.get("input") or ""))))
    before = [
        Message(role, _text(said))
        for turn in row.get("history") or ()
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    return Conversation((*_system(row), *before, Message("user", request), Message("assistant", _text(row["output"]))))


def _prompt_completion(row: Row) -> Conversation:
    completion = row["completion"]
    said = (Message("assistant", _text(completion)),) if isinstance(completion, str) else _messages(completion)
    return Conversation(_ending_in_answer(_request(row) + said))


_CONVERSATIONS: Forms[Conversation] = [
    (frozenset({"messages"}), _chat_messages),
    (frozenset({"conversations"}), _sharegpt),
    (frozenset({"instruction", "output"}), _alpaca),
    (frozenset({"prompt", "completion"}), _prompt_completion),
]

# --- forms of rated answers ---


def _helpsteer(row: Row) -> list[Rated]:
    """HelpSteer: one answer a row, and a column of numbers for each attribute."""
    others = {name: value for name, value in row.items() if name not in ("prompt", "response")}
    ratings = {name: _number(value) for name, value in others.items() if _is_number(value)}
    return [Rated(_request(row), _text(row["response"]), ratings)]


def _ultrafeedback(row: Row) -> list[Rated]:
    """UltraFeedback: some answers to one instruction, each with annotations, and a score over all of them."""
    found = []
    for completion in row["completions"]:
        given = {name: note["Rating"] for name, note in completion["annotations"].items()}
        given["overall"] = completion.get("overall_score")
        ratings = {name: _number(value) if _is_number(value) else math.nan for name, value in given.items()}
        found.append(Rated(_prompt(row["instruction"]), _text(completion["response"]), ratings))
    return found


def _rated_pair(row: Row) -> list[Rated]:
    """Two answers with numbers for each."""
    pair = _pku(row)
    return [
        Rated(pair.prompt, answer, {name: both[side] for name, both in pair.ratings.items()})
        for side, answer in enumerate(pair.answers)
    ]


_RATED: Forms[list[Rated]] = [
    (frozenset({"prompt", "response"}), _helpsteer),
    (frozenset({"instruction", "completions"}), _ultrafeedback),
    (frozenset({"prompt", "response_0", "response_1"}), _rated_pair),
]

# --- forms of prompts ---


def _asked(row: Row) -> Prompt:
    return _request(row)


def _alpaca_asked(row: Row) -> Prompt:
    return _alpaca({**row, "output": ""}).messages[:-1]


def _chat_asked(row: Row) -> Prompt:
    return _up_to_answer(_messages(row["messages"]))


def _sharegpt_asked(row: Row) -> Prompt:
    return _up_to_answer(_system(row) + _messages(row["conversations"]))


_PROMPTS: Forms[Prompt] = [
    (frozenset({"prompt"}), _asked),
    (frozenset({"messages"}), _chat_asked),
    (frozenset({"conversations"}), _sharegpt_asked),
    (frozenset({"instruction"}), _alpaca_asked),
]

# --- parts of rows; a ValueError says what is wrong, the caller says where ---


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    value.encode("utf-8")  # a lone surrogate is a ValueError here, not a crash in the tokenizer
    return value


def _turn(value: Row) -> Message:
    if "role" in value:
        return Message(_text(value["role"]), _text(value["content"]))
    role = _text(value["from"])
    if role not in SHAREGPT_ROLES:
        raise ValueError(f"unknown speaker {role!r}")
    return Message(SHAREGPT_ROLES[role], _text(value["value"]))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected text or a list of turns, found {type(value).__name__}")
    return tuple(_turn(turn) for turn in value)


def _prompt(value: Any) -> tuple[Message, ...]:
    return (Message("user", _text(value)),) if isinstance(value, str) else _messages(value)


def _request(row: Row, column: str = "prompt") -> tuple[Message, ...]:
    """What is asked, behind the system message where a column holds one."""
    return _behind_system(row, _prompt(row[column]))


def _behind_system(row: Row, turns: Prompt) -> tuple[Message, ...]:
    return (*turns,) if turns[:1] and turns[0].role == "system" else (*_system(row), *turns)


def _answer(message: Message) -> str:
    if message.role != "assistant":
        raise ValueError(f"the last turn is the {message.role}'s, not the assistant's")
    return message.content


def _up_to_answer(messages: Prompt) -> Prompt:
    return messages[:-1] if messages[-1].role == "assistant" else messages


def _ending_in_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    _answer(messages[-1])
    return messages


def _system(row: Row) -> tuple[Message, ...]:
    return (Message("system", _text(row["system"])),) if row.get("system") else ()


def _label(value: Any, name: str) -> int | None:
    if isinstance(value, str):  # as CSV has it
        value = _number(value) if _is_number(value) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value in (0, 1):
        return int(value)
    raise ValueError(f"{name} is {value!r}; expected 0, 1 or nothing for a tie")


def _ratings(row: Row, first: str, second: str) -> dict[str, tuple[float, float]]:
    """Numbers that stand once for each answer, as in score_chosen and score_rejected; nan where one is missing."""
    prefix, suffix = first.split("{}")
    names = [
        key[len(prefix) : len(key) - len(suffix)] for key in row if key.startswith(prefix) and key.endswith(suffix)
    ]
    found = {name: (row[first.format(name)], row.get(second.format(name), "no such column")) for name in names if name}
    return {name: (_number(a), _number(b)) for name, (a, b) in found.items() if _is_number(a) and _is_number(b)}


def _is_number(value: Any) -> bool:
    """A number, its text, or nothing at all."""
    if isinstance(value, str):
        try:
            float(value.strip() or "nan")
        except ValueError:
            return False
        return True
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float:
    if isinstance(value, str):
        value = value.strip() or "nan"
    return math.nan if value is None else float(value)

"""One function for each form rows come in, into the shapes everything here works on."""

import itertools
import math
import re
from collections.abc import Callable
from typing import TypeVar

from lora_align.data import cells
from lora_align.data.rows import Comparison, Conversation, Fact, Message, Prompt, Rated
from lora_align.data.sources import Row
from lora_align.errors import UserError

Shape = TypeVar("Shape", Comparison, list[Comparison], Conversation, list[Rated], Prompt, Fact)
Forms = list[tuple[frozenset[str], Callable[[Row], Shape]]]  # columns → the function that reads such rows
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


def fact(row: Row, where: str) -> Fact:
    """What one row wants to be known."""
    return _first_form(_FACTS, row, where, "fact")


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
        prompt=cells.request(row),
        answers=(cells.text(row["response_0"]), cells.text(row["response_1"])),
        labels={name: cells.label(value, name) for name, value in labels.items()},
        ratings=cells.ratings(row, "{}_0", "{}_1"),
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
    answers = (cells.text(row[first]), cells.text(row[second]))
    return Comparison(cells.request(row, prompt), answers, {strength: winner}, {strength: (0.0, value)})


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
    turns = [_transcript(cells.text(row[side])) for side in ("chosen", "rejected")]
    if turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    return Comparison(turns[0][:-1], (cells.answer(turns[0][-1]), cells.answer(turns[1][-1])), {"label": 0})


def _transcript(text: str) -> tuple[Message, ...]:
    start, *parts = TURN.split(text)
    if start.strip() or not parts:
        raise ValueError(r"not a transcript: it does not begin with \n\nHuman:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _chosen_rejected(row: Row) -> Comparison:
    """TRL's preference form, standard or conversational, with the prompt apart or shared by both."""
    chosen, rejected = row["chosen"], row["rejected"]
    ratings = {**cells.ratings(row, "chosen_{}", "rejected_{}"), **cells.ratings(row, "{}_chosen", "{}_rejected")}
    asked = next((name for name in ("prompt", "question") if name in row), "")  # question: PsychoCounsel-Preference
    if isinstance(chosen, str) and asked:
        return Comparison(cells.request(row, asked), (cells.text(chosen), cells.text(rejected)), {"label": 0}, ratings)
    if isinstance(chosen, str) and TURN.match(chosen):
        return _transcripts(row)
    if isinstance(chosen, str):
        if unread := [name for name in UNREAD if row.get(name)]:
            raise ValueError(f"no prompt column, but {unread[0]!r}: is it one? columns = {{ prompt = {unread[0]!r} }}")
        shared = _beginning(cells.text(chosen), cells.text(rejected))
        answers = (chosen.removeprefix(shared).lstrip(), rejected.removeprefix(shared).lstrip())
        return Comparison(cells.system(row) + cells.prompt(shared), answers, {"label": 0}, ratings)
    turns = [cells.messages(chosen), cells.messages(rejected)]
    prompt = cells.request(row) if "prompt" in row else cells.behind_system(row, turns[0][:-1])
    if "prompt" not in row and turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    answers = (cells.answer(turns[0][-1]), cells.answer(turns[1][-1]))
    if "prompt" in row and any(len(t) > 1 and t[:-1] not in (prompt, cells.prompt(row["prompt"])) for t in turns):
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
    answers = (cells.text(row["chosen"]), cells.text(row["rejected"]))
    return Comparison(_alpaca_asked(row), answers, {"label": 0}, cells.ratings(row, "{}_chosen", "{}_rejected"))


def _sharegpt_pair(row: Row) -> Comparison:
    """ShareGPT with two last turns: conversations, chosen, rejected."""
    answers = (cells.answer(cells.turn(row["chosen"])), cells.answer(cells.turn(row["rejected"])))
    ratings = cells.ratings(row, "{}_chosen", "{}_rejected")
    return Comparison(cells.system(row) + cells.messages(row["conversations"]), answers, {"label": 0}, ratings)


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
    return Conversation(cells.ending_in_answer(cells.messages(row["messages"])))


def _sharegpt(row: Row) -> Conversation:
    return Conversation(cells.ending_in_answer(cells.system(row) + cells.messages(row["conversations"])))


def _alpaca(row: Row) -> Conversation:
    request = "\n\n".join(filter(None, (cells.text(row["instruction"]), cells.text(row.get("input") or ""))))
    before = [
        Message(role, cells.text(said))
        for turn in row.get("history") or ()
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    return Conversation(
        (*cells.system(row), *before, Message("user", request), Message("assistant", cells.text(row["output"])))
    )


def _prompt_completion(row: Row) -> Conversation:
    completion = row["completion"]
    said = (
        (Message("assistant", cells.text(completion)),) if isinstance(completion, str) else cells.messages(completion)
    )
    return Conversation(cells.ending_in_answer(cells.request(row) + said))


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
    ratings = {name: cells.number(value) for name, value in others.items() if cells.is_number(value)}
    return [Rated(cells.request(row), cells.text(row["response"]), ratings)]


def _ultrafeedback(row: Row) -> list[Rated]:
    """UltraFeedback: some answers to one instruction, each with annotations, and a score over all of them."""
    found = []
    for completion in row["completions"]:
        given = {name: note["Rating"] for name, note in completion["annotations"].items()}
        given["overall"] = completion.get("overall_score")
        ratings = {name: cells.number(value) if cells.is_number(value) else math.nan for name, value in given.items()}
        found.append(Rated(cells.prompt(row["instruction"]), cells.text(completion["response"]), ratings))
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
    return cells.request(row)


def _alpaca_asked(row: Row) -> Prompt:
    return _alpaca({**row, "output": ""}).messages[:-1]


def _chat_asked(row: Row) -> Prompt:
    return cells.up_to_answer(cells.messages(row["messages"]))


def _sharegpt_asked(row: Row) -> Prompt:
    return cells.up_to_answer(cells.system(row) + cells.messages(row["conversations"]))


_PROMPTS: Forms[Prompt] = [
    (frozenset({"prompt"}), _asked),
    (frozenset({"messages"}), _chat_asked),
    (frozenset({"conversations"}), _sharegpt_asked),
    (frozenset({"instruction"}), _alpaca_asked),
]


# --- forms of fact ---


def _right_and_wrong(row: Row) -> Fact:
    wrong = row["wrong"] if isinstance(row["wrong"], list) else [row["wrong"]]
    found = Fact(cells.request(row), cells.text(row["right"]), tuple(map(cells.text, wrong)))
    if not found.wrong or found.right in found.wrong:
        raise ValueError("the right answer is among the wrong ones" if found.wrong else "`wrong` is empty")
    return found


_FACTS: Forms[Fact] = [(frozenset({"prompt", "right", "wrong"}), _right_and_wrong)]

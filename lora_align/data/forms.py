"""Forms of data: the columns of each known layout, and the function that reads such a row."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from lora_align.data import cells
from lora_align.data.rows import Comparison, Conversation, Fact, Message, Prompt, Rated, Row
from lora_align.plugins import Registry
from lora_align.rankers import Winner

TRUTHS = {"true": True, "1": True, "false": False, "0": False}  # as Parquet and CSV write booleans
MAYBE_PROMPT = ("query", "input", "context")  # columns that an error suggests as the missing prompt column
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")  # prompt columns of labelled pairs, in this order
ANSWER_COLUMNS = (  # column names of two answers
    ("response_0", "response_1"), ("output_1", "output_2"), ("response1", "response2"), ("response_1", "response_2"),
    ("output1", "output2"),
)  # fmt: skip
# columns that say which of two answers is better
LABEL = re.compile(r"(.+_)?labels?|winner|(.+_)?preference|preferred|choice|annotator\d*|.+_response_id")
TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")  # the start of a turn in a transcript of HH-RLHF
NAME_THE_PROMPT = 'name the prompt column with columns = { prompt = "NAME" }'


@dataclass(frozen=True)
class Form:
    """A form of row: its columns, and the function that reads a row into a shape of data/rows.py.

    A row is read by the first form that has the wanted shape and whose columns are all in the row. Forms of other
    packages are tried first. `read` returns the shape, or a list of comparisons or rated answers. Its ValueError names
    the column and what is wrong.
    """

    shape: Any  # the type that `read` returns: Comparison, Conversation, Rated, Prompt or Fact
    columns: Sequence[str]  # required columns with text or turns
    read: Callable[[Row], Any]
    numbers: Sequence[str] = ()  # further required columns
    answers: tuple[str, str] | None = None  # columns of the two answers that label columns compare
    strength: str = ""  # label column with a signed strength: negative for the first answer, positive for the second

    @cached_property
    def required(self) -> frozenset[str]:
        """Return all columns of the form."""
        return frozenset((*self.columns, *self.numbers))


SHAPE_NAMES: dict[Any, str] = {
    Comparison: "pair of answers", Conversation: "conversation", Rated: "rated answer", Prompt: "prompt", Fact: "fact",
}  # fmt: skip


def labels(row: Row) -> list[str]:
    """Return the columns that may say which of two answers is better."""
    return [name for name in row if LABEL.fullmatch(name) and not isinstance(row[name], list | dict)]


def numbered_from(names: tuple[str, str]) -> int | None:
    """Return 0 if the column names end in 0 and 1, 1 if they end in 1 and 2, else None."""
    return {("0", "1"): 0, ("1", "2"): 1}.get((names[0][-1:], names[1][-1:]))


# --- forms of comparison ---


def _two_answers(row: Row, prompt_column: str, names: tuple[str, str]) -> Comparison:
    """Read the form of PKU-SafeRLHF, PandaLM and LLMBar: two answers and label columns."""
    first = numbered_from(names) or 0
    return Comparison(
        prompt=cells.prompt_with_context(row, prompt_column),
        answers=(cells.text(row[names[0]], names[0]), cells.text(row[names[1]], names[1])),
        labels={name: cells.label(row[name], first) for name in labels(row)},
        ratings=_numbered_ratings(row, names),
        safe=_safe(row),
    )


def _numbered_ratings(row: Row, names: tuple[str, str]) -> dict[str, tuple[float, float]]:
    """Read ratings such as helpfulness_1 and helpfulness_2 of the answers in two columns."""
    first = numbered_from(names) or 0
    ratings = cells.ratings(row, f"{{}}_{first}", f"{{}}_{first + 1}")
    return {name: both for name, both in ratings.items() if f"{name}_{first}" != names[0]}


def _safe(row: Row) -> tuple[bool, bool] | None:
    """Return whether PKU-SafeRLHF calls each response safe; None if a value is missing."""
    first, second = (TRUTHS.get(str(row.get(f"is_response_{side}_safe")).lower()) for side in (0, 1))
    return None if first is None or second is None else (first, second)


def _strengths(row: Row, prompt: str, first: str, second: str, strength: str) -> Comparison:
    """Read the form of HelpSteer2 and 3: a strength from -3 (first much better) to 3 (second much better)."""
    answers = (cells.text(row[first], first), cells.text(row[second], second))
    winners = {name: cells.label(row[name], 1) for name in labels(row) if name != strength}
    ratings = _numbered_ratings(row, (first, second))
    if isinstance(row[strength], Winner):  # the recipe's `labels` say what the values mean
        winners[strength] = cells.label(row[strength], 1)
    else:
        value = cells.number(row[strength], strength)
        winners[strength] = int(value > 0) if value else None
        ratings[strength] = (0.0, value)
    return Comparison(cells.prompt_with_context(row, prompt), answers, winners, ratings)


def _between(first: Rated, second: Rated) -> Comparison:
    """Compare two rated answers to one prompt by the attributes that both have."""
    shared = [name for name in first.ratings if name in second.ratings]
    ratings = {name: (first.ratings[name], second.ratings[name]) for name in shared}
    return Comparison(first.prompt, (first.answer, second.answer), {}, ratings)


def _transcripts(row: Row) -> Comparison:
    """Read the form of HH-RLHF: two conversations as text that differ in the last answer."""
    turns = [_transcript(cells.text(row[side], side), side) for side in ("chosen", "rejected")]
    if turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    answers = (cells.answer(turns[0][-1], "chosen"), cells.answer(turns[1][-1], "rejected"))
    return Comparison(cells.with_system(row, turns[0][:-1]), answers, {"label": 0})


def _transcript(text: str, column: str) -> tuple[Message, ...]:
    start, *parts = TURN.split(text)
    if start.strip() or not parts:
        raise ValueError(rf"{column} is not a transcript of HH-RLHF; expected it to begin with \n\nHuman:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True))


def _chosen_rejected(row: Row) -> Comparison:
    """Read TRL's preference form, standard or conversational, with an explicit or an implicit prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    ratings = {**cells.ratings(row, "chosen_{}", "rejected_{}"), **cells.ratings(row, "{}_chosen", "{}_rejected")}
    column = next((name for name in ("prompt", "question") if name in row), "")  # question: PsychoCounsel-Preference
    if isinstance(chosen, str) and column:
        answers = (cells.text(chosen, "chosen"), cells.text(rejected, "rejected"))
        return Comparison(cells.prompt_with_context(row, column), answers, {"label": 0}, ratings)
    if isinstance(chosen, str) and TURN.match(chosen):
        return _transcripts(row)
    if isinstance(chosen, str):
        if unread := [name for name in MAYBE_PROMPT if row.get(name)]:
            raise ValueError(
                f"no prompt column; if {unread[0]!r} holds the prompt, add columns = {{ prompt = {unread[0]!r} }}"
            )
        shared = _common_prefix(cells.text(chosen, "chosen"), cells.text(rejected, "rejected"))
        answers = (chosen.removeprefix(shared).lstrip(), rejected.removeprefix(shared).lstrip())
        return Comparison(cells.system(row) + cells.prompt(shared, "chosen"), answers, {"label": 0}, ratings)
    turns = [cells.messages(chosen, "chosen"), cells.messages(rejected, "rejected")]
    prompt = cells.prompt_with_context(row) if "prompt" in row else cells.with_system(row, turns[0][:-1])
    if "prompt" not in row and turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    if "prompt" not in row and len(turns[0]) == 1:
        raise ValueError(f"chosen and rejected hold only an answer; {NAME_THE_PROMPT}")
    answers = (cells.answer(turns[0][-1], "chosen"), cells.answer(turns[1][-1], "rejected"))
    repeated = (prompt, cells.prompt(row["prompt"], "prompt")) if "prompt" in row else ()
    if repeated and any(len(t) > 1 and t[:-1] not in repeated for t in turns):
        raise ValueError("chosen and rejected hold turns before the answer that differ from the prompt column")
    return Comparison(prompt, answers, {"label": 0}, ratings)


def _common_prefix(first: str, second: str) -> str:
    """Return the whole words that both texts begin with: the prompt if there is no prompt column."""
    equal = itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False))
    shared = "".join(letter for letter, _ in equal)
    if not first[len(shared) :][:1].isspace() or not second[len(shared) :][:1].isspace():  # within a word
        shared = re.sub(r"\S+$", "", shared)
    shared = shared.rstrip()
    if not shared:
        raise ValueError(f"chosen and rejected have no common beginning; {NAME_THE_PROMPT}")
    return shared


def _alpaca_pair(row: Row) -> Comparison:
    """Read Alpaca's columns with two answers, or with two whole conversations."""
    if not isinstance(row["chosen"], str):
        return _chosen_rejected(row)
    answers = (cells.text(row["chosen"], "chosen"), cells.text(row["rejected"], "rejected"))
    return Comparison(_alpaca_prompt(row), answers, {"label": 0}, cells.ratings(row, "{}_chosen", "{}_rejected"))


def _sharegpt_pair(row: Row) -> Comparison:
    """Read ShareGPT's form with two last turns: conversations, chosen, rejected."""
    answers = [cells.answer(cells.turn(row[side], side), side) for side in ("chosen", "rejected")]
    ratings = cells.ratings(row, "{}_chosen", "{}_rejected")
    return Comparison(_turns(row, "conversations"), (answers[0], answers[1]), {"label": 0}, ratings)


def _better_and_worse(row: Row, prompt_column: str, column: str) -> Comparison:
    """Read LLaMA-Factory's form: [better, worse] in one column, with ratings such as score_chosen."""
    both = row[column]
    if not isinstance(both, list | tuple) or len(both) != 2:
        actual = f"a list of {len(both)}" if isinstance(both, list | tuple) else cells.kind(both)
        raise ValueError(f"{column} is {actual}; expected a list of two answers, [better, worse]")
    better, worse = (cells.text(one, column) for one in both)
    ratings = cells.ratings(row, "{}_chosen", "{}_rejected")
    return Comparison(cells.prompt_with_context(row, prompt_column), (better, worse), {"label": 0}, ratings)


def _each_with_each(row: Row) -> list[Comparison]:
    """Read UltraFeedback's form as one comparison for each pair of its answers."""
    return [_between(first, second) for first, second in itertools.combinations(_ultrafeedback(row), 2)]


# --- forms of conversation ---


def _turns(row: Row, column: str) -> tuple[Message, ...]:
    return cells.with_system(row, cells.messages(row[column], column))


def _chat_messages(row: Row) -> Conversation:
    return Conversation(cells.ending_in_answer(_turns(row, "messages"), "messages"))


def _sharegpt(row: Row) -> Conversation:
    return Conversation(cells.ending_in_answer(_turns(row, "conversations"), "conversations"))


def _alpaca(row: Row) -> Conversation:
    return Conversation((*_alpaca_prompt(row), Message("assistant", cells.text(row["output"], "output"))))


def _prompt_completion(row: Row) -> Conversation:
    """Read TRL's prompt and completion. In its unpaired form, `label` (or `kto_tag`) is false for a rejected one."""
    completion = row["completion"]
    for name in ("label", "kto_tag"):
        if TRUTHS.get(str(row.get(name)).lower()) is False:
            raise ValueError(f"{name} is false, so the completion is a rejected one; remove such rows")
    turns = (
        (Message("assistant", cells.text(completion, "completion")),)
        if isinstance(completion, str)
        else cells.messages(completion, "completion")
    )
    return Conversation(cells.ending_in_answer(cells.prompt_with_context(row) + turns, "completion"))


# --- forms of rated answers ---


def _helpsteer(row: Row) -> list[Rated]:
    """Read the form of HelpSteer: one answer per row, and a column of numbers for each attribute."""
    others = {name: value for name, value in row.items() if name not in ("prompt", "response")}
    ratings = {name: cells.number(value, name) for name, value in others.items() if cells.is_number(value)}
    return [Rated(cells.prompt_with_context(row), cells.text(row["response"], "response"), ratings)]


def _ultrafeedback(row: Row) -> list[Rated]:
    """Read the form of UltraFeedback: several answers to one instruction, each with annotations and a score."""
    if not isinstance(row["completions"], list | tuple):
        raise ValueError(f"completions is {cells.kind(row['completions'])}; expected a list of answers")
    answers = []
    for item in row["completions"]:
        completion = cells.record(item, "completions")
        notes = cells.record(completion.get("annotations"), "completions: annotations")
        raw_ratings = {name: cells.record(note, f"annotations: {name}").get("Rating") for name, note in notes.items()}
        raw_ratings["overall"] = completion.get("overall_score")
        ratings = {
            name: cells.number(value, name) if cells.is_number(value) else math.nan
            for name, value in raw_ratings.items()
        }
        answer = cells.text(completion.get("response"), "completions: response")
        answers.append(Rated(cells.prompt_with_context(row, "instruction"), answer, ratings))
    return answers


def _rated_pair(row: Row) -> list[Rated]:
    """Read two answers with numbers for each, such as helpfulness_0 and helpfulness_1."""
    return _each_rated(_two_answers(row, "prompt", ANSWER_COLUMNS[0]))


def _rated_chosen_rejected(row: Row) -> list[Rated]:
    """Read chosen and rejected answers with a number for each, such as score_chosen and score_rejected."""
    return _each_rated(_chosen_rejected(row))


def _each_rated(pair: Comparison) -> list[Rated]:
    return [
        Rated(pair.prompt, answer, {name: both[side] for name, both in pair.ratings.items()})
        for side, answer in enumerate(pair.answers)
    ]


# --- forms of prompts ---


def _prompt(row: Row) -> Prompt:
    return cells.prompt_with_context(row)


def _alpaca_prompt(row: Row) -> Prompt:
    return cells.prompt_with_context(row, "instruction")


def _chat_prompt(row: Row) -> Prompt:
    return cells.without_answer(_turns(row, "messages"))


def _sharegpt_prompt(row: Row) -> Prompt:
    return cells.without_answer(_turns(row, "conversations"))


# --- forms of fact ---


def _right_and_wrong(row: Row) -> Fact:
    wrong = row["wrong"] if isinstance(row["wrong"], list) else [row["wrong"]]
    right = cells.text(row["right"], "right")
    fact = Fact(cells.prompt_with_context(row), right, tuple(cells.text(one, "wrong") for one in wrong))
    if not fact.wrong or fact.right in fact.wrong:
        raise ValueError("the right answer is among the wrong ones" if fact.wrong else "`wrong` is empty")
    return fact


# --- all forms ---


def _labelled(*answers: tuple[str, str]) -> list[Form]:
    return [
        Form(Comparison, (column, *names), partial(_two_answers, prompt_column=column, names=names), answers=names)
        for column in PROMPT_COLUMNS
        for names in answers
    ]


def _strength_form(prompt: str, first: str, second: str, strength: str) -> Form:
    read = partial(_strengths, prompt=prompt, first=first, second=second, strength=strength)
    return Form(Comparison, (prompt, first, second), read, (strength,), (first, second), strength)


_BUILT_IN = [  # in the order in which they are tried
    Form(Comparison, ("instruction", "completions"), _each_with_each),
    *_labelled(ANSWER_COLUMNS[0]),
    _strength_form("prompt", "response_1", "response_2", "preference_strength"),
    _strength_form("context", "response1", "response2", "overall_preference"),
    Form(Comparison, ("conversations", "chosen", "rejected"), _sharegpt_pair),
    Form(Comparison, ("instruction", "chosen", "rejected"), _alpaca_pair),
    Form(Comparison, ("chosen", "rejected"), _chosen_rejected),
    *_labelled(*ANSWER_COLUMNS[1:]),
    Form(Comparison, ("prompt", "response"), partial(_better_and_worse, prompt_column="prompt", column="response")),
    Form(
        Comparison,
        ("instruction", "output"),
        partial(_better_and_worse, prompt_column="instruction", column="output"),
    ),
    Form(Conversation, ("messages",), _chat_messages),
    Form(Conversation, ("conversations",), _sharegpt),
    Form(Conversation, ("instruction", "output"), _alpaca),
    Form(Conversation, ("prompt", "completion"), _prompt_completion),
    Form(Rated, ("prompt", "response"), _helpsteer),
    Form(Rated, ("instruction", "completions"), _ultrafeedback),
    Form(Rated, ("prompt", "response_0", "response_1"), _rated_pair),
    Form(Rated, ("chosen", "rejected"), _rated_chosen_rejected),
    Form(Prompt, ("prompt",), _prompt),
    Form(Prompt, ("messages",), _chat_prompt),
    Form(Prompt, ("conversations",), _sharegpt_prompt),
    Form(Prompt, ("instruction",), _alpaca_prompt),
    Form(Fact, ("prompt", "right", "wrong"), _right_and_wrong),
]
FORMS = Registry(
    "forms", Form, {f"{SHAPE_NAMES[form.shape]}: {', '.join(sorted(form.required))}": form for form in _BUILT_IN}
)

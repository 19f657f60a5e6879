"""One function for each form rows come in, into the shapes everything here works on."""

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from lora_align.data import cells
from lora_align.data.rows import Comparison, Conversation, Fact, Message, Prompt, Rated
from lora_align.data.sources import Row
from lora_align.errors import UserError

Shape = TypeVar("Shape", Comparison, list[Comparison], Conversation, list[Rated], Prompt, Fact)
Forms = list[tuple[frozenset[str], Callable[[Row], Shape]]]  # columns → the function that reads such rows
TRUTHS = {"true": True, "1": True, "false": False, "0": False}  # as Parquet and CSV have them
UNREAD = ("query", "input", "context")  # columns that may be what is asked
ASKED = ("prompt", "instruction", "question", "input")  # columns with what two answers reply to; the first one counts
ANSWERS = (  # names of two answers' columns
    ("response_0", "response_1"), ("output_1", "output_2"), ("response1", "response2"), ("response_1", "response_2"),
    ("output1", "output2"),
)  # fmt: skip
LABEL = re.compile(r"label|winner|annotator\d*|.+_response_id")  # columns that say which of two answers is better
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


def label_columns(row: Row) -> tuple[tuple[str, str], list[str]] | None:
    """The columns of two answers, and those that may say which is better; None for rows of another form."""
    read = next((read for columns, read in _COMPARISONS if columns <= row.keys()), None)
    return (read.keywords["names"], _labels(row)) if isinstance(read, partial) and "names" in read.keywords else None


def _labels(row: Row) -> list[str]:
    return [name for name in row if LABEL.fullmatch(name)]


def numbered_from(names: tuple[str, str]) -> int | None:
    """The number of the first of two answers by their columns' names; None where they count in another way."""
    ends = (names[0][-1:], names[1][-1:])
    known = {("0", "1"): 0, ("1", "2"): 1}.get(ends)
    return 0 if known is None and not "".join(ends).isdigit() else known


def _first_form(forms: Forms[Shape], row: Row, where: str, what: str) -> Shape:
    """Read by the first form whose columns are all there; a fault of the row is told with its place."""
    for columns, read in forms:
        if columns <= row.keys():
            try:
                return read(row)
            except ValueError as fault:
                raise UserError(f"{where}: {fault}") from fault
            except RecursionError as fault:
                raise UserError(f"{where}: nested too deeply to be read") from fault
    missing = min((sorted(columns - row.keys()) for columns, _ in forms), key=len)  # of the form that is nearest
    raise UserError(
        f"{where}: no {what} in columns {', '.join(map(str, row))} (nearest: with {' and '.join(missing)}); "
        "`columns` names them otherwise, skip_bad = true counts such rows"
    )


# --- forms of comparison ---


def _two_answers(row: Row, asked: str, names: tuple[str, str]) -> Comparison:
    """PKU-SafeRLHF, PandaLM, LLMBar: two answers, and columns that say which is better."""
    first = numbered_from(names) or 0
    apart = "_" if "_" in names[0] else None  # before the number of an answer
    rated = cells.ratings(row, f"{{}}_{first}", f"{{}}_{first + 1}") if apart else {}
    return Comparison(
        prompt=cells.request(row, asked),
        answers=(cells.text(row[names[0]], names[0]), cells.text(row[names[1]], names[1])),
        labels={name: cells.label(row[name], first) for name in _labels(row)},
        ratings={name: both for name, both in rated.items() if f"{name}_{first}" != names[0]},
        safe=_safe(row),
    )


def _safe(row: Row) -> tuple[bool, bool] | None:
    """PKU-SafeRLHF's own word on each response."""
    first, second = (TRUTHS.get(str(row.get(f"is_response_{side}_safe")).lower()) for side in (0, 1))
    return None if first is None or second is None else (first, second)


def _strengths(row: Row, prompt: str, first: str, second: str, strength: str) -> Comparison:
    """HelpSteer2 and 3: a number from -3, the first is much better, to 3, the second is."""
    value = cells.number(row[strength], strength)
    if not -3 <= value <= 3:
        raise ValueError(f"{strength} is {value:g}; expected -3 to 3")
    winner = None if value == 0 else int(value > 0)
    answers = (cells.text(row[first], first), cells.text(row[second], second))
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
    turns = [_transcript(cells.text(row[side], side)) for side in ("chosen", "rejected")]
    if turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    answers = (cells.answer(turns[0][-1], "chosen"), cells.answer(turns[1][-1], "rejected"))
    return Comparison(cells.behind_system(row, turns[0][:-1]), answers, {"label": 0})


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
        answers = (cells.text(chosen, "chosen"), cells.text(rejected, "rejected"))
        return Comparison(cells.request(row, asked), answers, {"label": 0}, ratings)
    if isinstance(chosen, str) and TURN.match(chosen):
        return _transcripts(row)
    if isinstance(chosen, str):
        if unread := [name for name in UNREAD if row.get(name)]:
            raise ValueError(f"no prompt column, but {unread[0]!r}: is it one? columns = {{ prompt = {unread[0]!r} }}")
        shared = _beginning(cells.text(chosen, "chosen"), cells.text(rejected, "rejected"))
        answers = (chosen.removeprefix(shared).lstrip(), rejected.removeprefix(shared).lstrip())
        return Comparison(cells.system(row) + cells.prompt(shared, "chosen"), answers, {"label": 0}, ratings)
    turns = [cells.messages(chosen, "chosen"), cells.messages(rejected, "rejected")]
    prompt = cells.request(row) if "prompt" in row else cells.behind_system(row, turns[0][:-1])
    if "prompt" not in row and turns[0][:-1] != turns[1][:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    if "prompt" not in row and len(turns[0]) == 1:
        raise ValueError("chosen and rejected hold an answer alone, and there is no prompt column")
    answers = (cells.answer(turns[0][-1], "chosen"), cells.answer(turns[1][-1], "rejected"))
    repeated = (prompt, cells.prompt(row["prompt"], "prompt")) if "prompt" in row else ()
    if repeated and any(len(t) > 1 and t[:-1] not in repeated for t in turns):
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
    answers = (cells.text(row["chosen"], "chosen"), cells.text(row["rejected"], "rejected"))
    return Comparison(_alpaca_asked(row), answers, {"label": 0}, cells.ratings(row, "{}_chosen", "{}_rejected"))


def _sharegpt_pair(row: Row) -> Comparison:
    """ShareGPT with two last turns: conversations, chosen, rejected."""
    answers = [cells.answer(cells.turn(row[side], side), side) for side in ("chosen", "rejected")]
    ratings = cells.ratings(row, "{}_chosen", "{}_rejected")
    return Comparison(_turns(row, "conversations"), (answers[0], answers[1]), {"label": 0}, ratings)


def _better_and_worse(row: Row, asked: str, column: str) -> Comparison:
    """LLaMA-Factory: the better answer and the worse one, in a list."""
    both = row[column]
    if not isinstance(both, list | tuple) or len(both) != 2:
        found = f"a list of {len(both)}" if isinstance(both, list | tuple) else cells.kind(both)
        raise ValueError(f"{column} is {found}; a pair has two answers there, [better, worse]")
    better, worse = (cells.text(one, column) for one in both)
    return Comparison(cells.request(row, asked), (better, worse), {"label": 0})


def _labelled(*answers: tuple[str, str]) -> Forms[Comparison]:
    return [
        (frozenset({asked, *names}), partial(_two_answers, asked=asked, names=names))
        for asked in ASKED
        for names in answers
    ]


_COMPARISONS: Forms[Comparison] = [
    *_labelled(ANSWERS[0]),
    (frozenset({"prompt", "response_1", "response_2", "preference_strength"}), _helpsteer2_pair),
    (frozenset({"context", "response1", "response2", "overall_preference"}), _helpsteer3),
    (frozenset({"conversations", "chosen", "rejected"}), _sharegpt_pair),
    (frozenset({"instruction", "chosen", "rejected"}), _alpaca_pair),
    (frozenset({"chosen", "rejected"}), _chosen_rejected),
    *_labelled(*ANSWERS[1:]),
    (frozenset({"prompt", "response"}), partial(_better_and_worse, asked="prompt", column="response")),
    (frozenset({"instruction", "output"}), partial(_better_and_worse, asked="instruction", column="output")),
]

# --- forms of conversation ---


def _turns(row: Row, column: str) -> tuple[Message, ...]:
    """Turns behind the system message that another column may hold."""
    return cells.behind_system(row, cells.messages(row[column], column))


def _chat_messages(row: Row) -> Conversation:
    return Conversation(cells.ending_in_answer(_turns(row, "messages"), "messages"))


def _sharegpt(row: Row) -> Conversation:
    return Conversation(cells.ending_in_answer(_turns(row, "conversations"), "conversations"))


def _alpaca(row: Row) -> Conversation:
    return Conversation((*_alpaca_asked(row), Message("assistant", cells.text(row["output"], "output"))))


def _prompt_completion(row: Row) -> Conversation:
    said = row["completion"]
    turns = (
        (Message("assistant", cells.text(said, "completion")),)
        if isinstance(said, str)
        else cells.messages(said, "completion")
    )
    return Conversation(cells.ending_in_answer(cells.request(row) + turns, "completion"))


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
    ratings = {name: cells.number(value, name) for name, value in others.items() if cells.is_number(value)}
    return [Rated(cells.request(row), cells.text(row["response"], "response"), ratings)]


def _ultrafeedback(row: Row) -> list[Rated]:
    """UltraFeedback: some answers to one instruction, each with annotations, and a score over all of them."""
    if not isinstance(row["completions"], list | tuple):
        raise ValueError(f"completions is {cells.kind(row['completions'])}; expected a list of answers")
    found = []
    for one in row["completions"]:
        completion = cells.record(one, "completions")
        notes = cells.record(completion.get("annotations"), "completions: annotations")
        given = {name: cells.record(note, f"annotations: {name}").get("Rating") for name, note in notes.items()}
        given["overall"] = completion.get("overall_score")
        ratings = {
            name: cells.number(value, name) if cells.is_number(value) else math.nan for name, value in given.items()
        }
        answer = cells.text(completion.get("response"), "completions: response")
        found.append(Rated(cells.request(row, "instruction"), answer, ratings))
    return found


def _rated_pair(row: Row) -> list[Rated]:
    """Two answers with numbers for each."""
    pair = _two_answers(row, "prompt", ANSWERS[0])
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
    return cells.request(row, "instruction")


def _chat_asked(row: Row) -> Prompt:
    return cells.up_to_answer(_turns(row, "messages"))


def _sharegpt_asked(row: Row) -> Prompt:
    return cells.up_to_answer(_turns(row, "conversations"))


_PROMPTS: Forms[Prompt] = [
    (frozenset({"prompt"}), _asked),
    (frozenset({"messages"}), _chat_asked),
    (frozenset({"conversations"}), _sharegpt_asked),
    (frozenset({"instruction"}), _alpaca_asked),
]


# --- forms of fact ---


def _right_and_wrong(row: Row) -> Fact:
    wrong = row["wrong"] if isinstance(row["wrong"], list) else [row["wrong"]]
    right = cells.text(row["right"], "right")
    found = Fact(cells.request(row), right, tuple(cells.text(one, "wrong") for one in wrong))
    if not found.wrong or found.right in found.wrong:
        raise ValueError("the right answer is among the wrong ones" if found.wrong else "`wrong` is empty")
    return found


_FACTS: Forms[Fact] = [(frozenset({"prompt", "right", "wrong"}), _right_and_wrong)]

"""Row reader: read a row into a dataclass of `rows` with the first form that fits its columns."""

from functools import cache
from typing import Any

from lora_align.data.forms import ANSWER_COLUMNS, FORMS, SHAPE_NAMES, Form, labels, numbered_from
from lora_align.data.rows import Comparison, Conversation, Fact, Prompt, Rated, Row
from lora_align.errors import UserError


class UnknownFormError(UserError):
    """No form reads a row's columns. The caller adds a remedy that fits its command."""


def comparisons(row: Row, where: str) -> list[Comparison]:
    """Read a row as comparisons: one for two answers, one for each pair of several answers."""
    return _listed(_read(Comparison, row, where))


def conversation(row: Row, where: str) -> Conversation:
    """Read a row as a conversation that ends with an answer."""
    result: Conversation = _read(Conversation, row, where)
    return result


def rated(row: Row, where: str) -> list[Rated]:
    """Read the rated answers of a row."""
    return _listed(_read(Rated, row, where))


def prompt(row: Row, where: str) -> Prompt:
    """Read the prompt of a row: its turns without the answer at the end."""
    result: Prompt = _read(Prompt, row, where)
    return result


def fact(row: Row, where: str) -> Fact:
    """Read a row as a fact."""
    result: Fact = _read(Fact, row, where)
    return result


def answers(row: Row, where: str) -> list[Rated]:
    """Read every answer of a row with its prompt; `ratings` is empty for an unrated answer."""
    if _form(Rated, row):
        return rated(row, where)
    *turns, last = conversation(row, where).messages
    return [Rated(tuple(turns), last.content, {})]


def label_columns(row: Row) -> tuple[tuple[str, str], list[str]] | None:
    """Return the columns of the two answers and the label columns; None if the form has no labels.

    A column of strengths comes first.
    """
    form = _form(Comparison, row)
    if not form or not form.answers:
        return None
    return form.answers, [*filter(None, [form.strength]), *(name for name in labels(row) if name != form.strength)]


def strength_column(row: Row) -> str:
    """Return the column with the strength of a row's preference; "" if its form has none."""
    form = _form(Comparison, row)
    return form.strength if form else ""


@cache
def strength_columns() -> frozenset[str]:
    """Return the columns with a strength of all forms."""
    return frozenset(form.strength for form in _all_forms() if form.strength)


@cache
def text_columns() -> tuple[str, ...]:
    """Return the columns with text or turns of all forms except forms of facts."""
    columns = (column for form in _all_forms() if form.shape is not Fact for column in form.columns)
    return tuple(dict.fromkeys(columns))


def rating_suffixes(row: Row) -> tuple[str, str]:
    """Return the endings of the columns with a rating for each of a row's two answers, such as `_0` and `_1`."""
    form = _form(Comparison, row)
    numbered = (numbered_from(names) for names in ANSWER_COLUMNS if form and {*names} <= {*form.columns})
    first = next(numbered, None)
    return ("_chosen", "_rejected") if first is None else (f"_{first}", f"_{first + 1}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _all_forms() -> list[Form]:
    """Return all forms in the order in which they are tried."""
    return [*FORMS.registered(), *FORMS.built_in.values()]


@cache
def _forms(shape: Any) -> list[Form]:
    return [form for form in _all_forms() if form.shape == shape]


def _form(shape: Any, row: Row) -> Form | None:
    return next((form for form in _forms(shape) if form.required <= row.keys()), None)


def _read(shape: Any, row: Row, where: str) -> Any:
    """Read a row into a shape; errors name the place of the row."""
    form = _form(shape, row)
    if form is None:
        # of equally near forms: the one that needs `chosen`, else the one with most columns
        forms = [(sorted(form.required - row.keys()), len(form.required)) for form in _forms(shape)]
        missing, _ = min(forms, key=lambda form: (len(form[0]), "chosen" not in form[0], -form[1]))
        raise UnknownFormError(
            f"{where}: no {SHAPE_NAMES[shape]} in columns {', '.join(map(str, row))} (the nearest form also needs "
            f"{' and '.join(missing)})"
        )
    try:
        return form.read(row)
    except ValueError as fault:
        raise UserError(f"{where}: {fault}") from fault
    except RecursionError as fault:
        raise UserError(f"{where}: nested too deeply to be read") from fault

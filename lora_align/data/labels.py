"""Label columns: detect the column that says which answer is better, and what its values mean.

The whole column is checked before the first row is read. A single row cannot tell labels 1, 2 from labels 0, 1, and a
wrong guess would invert every preference.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_align.console import count
from lora_align.data import cells, forms, row_reader, sources
from lora_align.data.rows import Row
from lora_align.errors import UserError
from lora_align.rankers import Winner
from lora_align.recipe import Preference

SHOWN = 6  # values shown in an error
ORDERED = (("1", "2"), ("A", "B"), ("a", "b"), ("first", "second"), ("model_a", "model_b"))  # values of two answers
TIES = re.compile(r"tie.*|draw|equal|same|both.*|neither|none", re.IGNORECASE)


@dataclass
class Column:
    """The values of a label column."""

    values: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)  # value → where it first occurs


@dataclass(frozen=True)
class Labels:
    """The label column that ranks, and the answer that each of its values prefers."""

    column: str
    meaning: Mapping[str, Winner]

    def decode(self, row: Row) -> Row:
        """Replace the row's label by its Winner; return a row without labels unchanged."""
        if self.column not in row or row_reader.label_columns(row) is None:
            return row
        key = cells.label_text(row[self.column])
        return {**row, self.column: self.meaning.get(key, row[self.column])}


def labels_of(preference: Preference) -> Labels | None:
    """Read every label of a preference's data and return their meaning; None if the rows have no label column."""
    ranker = preference.ranker
    by_strength = ranker.kind == "rating" and ranker.column in row_reader.strength_columns()
    if ranker.kind != "label" and not by_strength:
        return None
    columns: dict[str, Column] = {}
    strength, names = "", forms.ANSWER_COLUMNS[0]
    for where, row in sources.readable_rows(preference, lambda row, _: row):
        if layout := row_reader.label_columns(row):
            if columns and layout[0] != names:
                before, now = (" and ".join(of) for of in (names, layout[0]))
                raise UserError(
                    f"{where}: the answers are in {now}, in earlier rows in {before}; split the data into two sources"
                )
            names, strength = layout[0], strength or row_reader.strength_column(row)
            for name in layout[1]:
                column = columns.setdefault(name, Column())
                key = cells.label_text(row[name])
                column.values[key] += 1
                column.places.setdefault(key, where)
    if by_strength:
        if ranker.column == strength:
            _check_strengths(columns[strength], strength)
        return None
    ranks = ranker.column or ("label" if "label" in preference.columns else "")
    if not ranks and len(columns) > 1:
        listed = ", ".join(columns)
        raise UserError(
            f"{sources.name(preference)}: several label columns ({listed}); choose the one that ranks, as in "
            f'rank = "label:{next(iter(columns))}"'
        )
    ranks = ranks or next(iter(columns), "")
    if preference.labels and ranks not in columns:
        raise UserError(
            f"{sources.name(preference)}: `labels` is set, but the rows have no label column {ranks or ''}".rstrip()
            + (f" (label columns: {', '.join(columns)}); correct `rank`" if columns else "; remove `labels`")
        )
    if ranks not in columns:  # the form has no labels (chosen, rejected), or `Comparison.ranked` refuses the column
        return None
    if ranks == strength and not preference.labels:
        _check_strengths(columns[ranks], ranks)
        return Labels(ranks, {})
    original_names = (preference.columns.get(names[0], names[0]), preference.columns.get(names[1], names[1]))
    return Labels(ranks, _meaning(preference, ranks, columns[ranks], original_names))


def _check_strengths(column: Column, name: str) -> None:
    """Refuse a column that holds no strengths from -3 to 3. A column without negative values may hold labels."""
    strengths = {value: float(value) for value in column.values if value and cells.is_number(value)}
    for value in column.places:
        if value and not -3 <= strengths.get(value, math.inf) <= 3:
            raise _refused(column, name, value, "expected a strength from -3 (first) to 3 (second)")
    if strengths and min(strengths.values()) >= 0 and max(strengths.values()) > 0:
        value = next(value for value, strength in strengths.items() if strength)
        raise _refused(column, name, value, "no strength is negative, so the values may be labels", ordered=False)


def _meaning(preference: Preference, name: str, column: Column, answers: tuple[str, str]) -> Mapping[str, Winner]:
    """Return the meaning of each value by the recipe's `labels`, or else by the numbers of the answer columns."""
    seen = {value for value in column.values if value}
    first = forms.numbered_from(answers)
    declared = {cells.label_text(value): winner for value, winner in preference.labels.items()}
    meaning = declared or ({} if first is None else cells.numbered(first))
    if unknown := [value for value in column.places if value in seen - meaning.keys()]:
        expected = f"expected {', '.join(meaning)}, or nothing for a tie" if meaning else "its meaning is unknown"
        raise _refused(column, name, unknown[0], expected, ordered=bool(meaning))
    if not declared and "0" in seen and first == 1 and "2" not in seen:
        why = f"no label is 2, so 0 may mean {answers[0]} or a tie"
        raise _refused(column, name, "0", why, ordered=False)
    return meaning


def _refused(column: Column, name: str, value: str, why: str, *, ordered: bool = True) -> UserError:
    """Return the error for a column's value. Without `ordered`, the error proposes no meaning of the values."""
    values = Counter({label: number for label, number in column.values.items() if label})
    counted = ", ".join(f"{_short(label)} ({number:,})" for label, number in values.most_common(SHOWN))
    more = f" and {count(len(values) - SHOWN, 'other value')}" if len(values) > SHOWN else ""
    return UserError(
        f"{column.places[value]}: {name} is {_short(value)}; {why}. The column holds {counted}{more}; set which answer "
        f'each value prefers, with rank = "label:{name}" and labels = {{ {_proposed(sorted(values), ordered)} }}'
    )


def _proposed(values: Iterable[str], ordered: bool) -> str:
    """Return a `labels` table in TOML. The user fills in the winners of values whose order is unknown."""
    *winners, tie = Winner
    ties = [value for value in values if TIES.fullmatch(value)]
    others = [value for value in values if value not in ties]
    if len(others) > len(winners) and others[0] == "0":  # 0, 1, 2
        ties, others = [*ties, others[0]], others[1:]
    if len(others) == 1:  # `labels` needs a first and a second
        others = next((list(both) for both in ORDERED if others[0] in both), others)
    if not ordered or tuple(others) not in ORDERED:  # a guess could invert the preference
        shown = [f'{_key(value)} = "first, second or tie"' for value in [*others, *ties]]
        return ", ".join([*shown[:SHOWN], *(["…"] if len(shown) > SHOWN else [])])
    meanings = [*zip(others, winners, strict=True), *((value, tie) for value in ties)]
    return ", ".join(f'{_key(value)} = "{winner}"' for value, winner in meanings)


def _key(value: str) -> str:
    value = _short(value)
    return value if re.fullmatch(r"[A-Za-z0-9_-]+", value) else json.dumps(value, ensure_ascii=False)


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:40]}…"

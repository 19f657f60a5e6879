"""Label columns: which one ranks, and which of two answers each of its values prefers.

A value that means neither is a fault of the column, never of a row. So the whole column is looked at before the first
row is read: 1 and 2 read as 0 and 1 would turn every preference round.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_align.data import cells, forms, sources
from lora_align.data.sources import Row
from lora_align.errors import UserError
from lora_align.rankers import Winner
from lora_align.recipe import Preference

UNLABELLED = 1000  # rows of another form, after which no label columns are looked for
SHOWN = 6  # values that an error names
TIES = re.compile(r"tie.*|draw|equal|same|both.*|neither|none", re.IGNORECASE)


@dataclass
class Column:
    """What a label column holds: how often, and where first."""

    values: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Labels:
    """The column that ranks, and what its values mean."""

    column: str
    meaning: Mapping[str, Winner]

    def decoded(self, row: Row) -> Row:
        """The row, with a winner in the place of its label; as it is, where it is of a form without labels."""
        if self.column not in row or forms.label_columns(row) is None:
            return row
        written = cells.label_text(row[self.column])
        return {**row, self.column: self.meaning.get(written, row[self.column])}


def labels_of(preference: Preference) -> Labels | None:
    """Look at every label of a preference's data; None where its rows are of a form without any."""
    if preference.ranker.kind != "label":
        return None
    columns: dict[str, Column] = {}
    names: tuple[str, str] = forms.ANSWERS[0]
    for number, (where, row) in enumerate(sources.sound(preference, lambda row, _: row)):
        if found := forms.label_columns(row):
            names = found[0]
            for name in found[1]:
                column = columns.setdefault(name, Column())
                written = cells.label_text(row[name])
                column.values[written] += 1
                column.places.setdefault(written, where)
        elif number >= UNLABELLED and not columns:
            break
    ranks = preference.ranker.column or ("label" if "label" in preference.columns else "")
    if not ranks and len(columns) > 1:
        listed = ", ".join(columns)
        raise UserError(
            f"{sources.name(preference)}: several label columns ({listed}); name the one that ranks, as in "
            f'rank = "label:{next(iter(columns))}"'
        )
    ranks = ranks or next(iter(columns), "")
    if preference.labels and ranks not in columns:
        raise UserError(
            f"{sources.name(preference)}: `labels` is given, but its rows have no label column to read by it"
        )
    if ranks not in columns:
        return None  # rows say by themselves which answer is better, or lack what ranks them
    theirs = (preference.columns.get(names[0], names[0]), preference.columns.get(names[1], names[1]))
    return Labels(ranks, _meaning(preference, ranks, columns[ranks], theirs))


def _meaning(preference: Preference, name: str, column: Column, answers: tuple[str, str]) -> Mapping[str, Winner]:
    """What the values of a column mean, as the recipe or the names of the answers' columns say."""
    seen = {value for value in column.values if value}
    first = forms.numbered_from(answers)
    given = {cells.label_text(value): winner for value, winner in preference.labels.items()}
    meaning = given or ({} if first is None else cells.numbered(first))
    if unknown := [value for value in column.places if value in seen - meaning.keys()]:
        expected = ", ".join(meaning) or "what `labels` says"
        raise _refused(column, name, unknown[0], f"expected {expected}, or nothing for a tie")
    if not given and "0" in seen and first == 1 and "2" not in seen:
        why = f"it may be the first of {' and '.join(answers)}, or a tie, as no label is 2"
        raise _refused(column, name, "0", why)
    return meaning


def _refused(column: Column, name: str, value: str, why: str) -> UserError:
    counted = ", ".join(f"{_short(of)} ({count:,})" for of, count in column.values.most_common(SHOWN) if of)
    more = f" and {len(column.values) - SHOWN:,} other values" if len(column.values) > SHOWN else ""
    return UserError(
        f"{column.places[value]}: {name} is {_short(value)}; {why}. The column holds {counted}{more}: say which answer "
        f"each value prefers, as in labels = {{ {_proposed(sorted(filter(None, column.values)))} }}"
    )


def _proposed(values: Iterable[str]) -> str:
    """A table for these values, as TOML has it; a person has to check it."""
    *winners, tie = Winner
    ties = [value for value in values if TIES.fullmatch(value)]
    others = [value for value in values if value not in ties]
    if len(others) > len(winners) and others[0] == "0":  # 0, 1, 2
        ties, others = [*ties, others[0]], others[1:]
    shown = [*zip(others, winners, strict=False), *((value, tie) for value in ties)]
    return ", ".join(f'{_key(value)} = "{winner}"' for value, winner in shown)


def _key(value: str) -> str:
    return value if re.fullmatch(r"[A-Za-z0-9_-]+", value) else json.dumps(_short(value), ensure_ascii=False)


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:40]}…"

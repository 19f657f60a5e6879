"""From a table of ratings to rated answers, every attribute on one scale from 0 to 100."""

import math
from collections import Counter

from lora_align.data import forms, sources
from lora_align.data.pairs import Split, is_held_out
from lora_align.data.rows import Rated
from lora_align.errors import UserError
from lora_align.recipe import Ratings

POINTS = 100.0


def read_ratings(table: Ratings, held_out: float, limit: int | None, dropped: Counter[str]) -> Split[Rated]:
    """Rated answers, nan where raters did not say; `limit` to train on, and the rest of the row they came in."""
    train = 0
    for where, answers in sources.read(table, forms.rated, dropped):
        for row in answers:
            scaled = _scaled(row, table)
            if isinstance(scaled, str) and not table.skip_bad:
                raise UserError(f"{where}: {scaled}")
            if isinstance(scaled, str):
                dropped[sources.INVALID] += 1
            elif not row.answer.strip():
                dropped["empty answer"] += 1
            elif all(map(math.isnan, scaled.values())):
                dropped["no rating"] += 1
            else:
                aside = is_held_out(row.prompt, held_out)
                yield Rated(row.prompt, row.answer, scaled), aside
                train += not aside
        if limit and train >= limit:
            break


def _scaled(row: Rated, table: Ratings) -> dict[str, float] | str:
    """The attributes asked for, from the raters' scale to points; or what is wrong: one is not there, or off the
    scale."""
    wanted = table.attributes or tuple(row.ratings)
    missing = [name for name in wanted if name not in row.ratings]
    if missing:
        return f"no rating {missing[0]!r} (it has: {', '.join(row.ratings) or 'none'})"
    scaled = {}
    for name in wanted:
        value = row.ratings[name]
        if not math.isnan(value) and not table.low <= value <= table.high:
            return f"{name} is {value:g}; the recipe's scale is {table.low:g} to {table.high:g}"
        scaled[table.prefix + name] = POINTS * (value - table.low) / (table.high - table.low)
    return scaled

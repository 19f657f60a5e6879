"""Rated answers of a [reward.ratings.NAME] table, with every attribute scaled to 0 to 100."""

import math
from collections import Counter

from lora_align.data import row_reader, sources
from lora_align.data.pairs import Quota, Split, held_out_threshold, is_held_out
from lora_align.data.rows import Rated
from lora_align.errors import UserError
from lora_align.recipe import Ratings

SCALE = 100.0


def read_ratings(table: Ratings, held_out: float, limit: int | None, dropped: Counter[str]) -> Split[Rated]:
    """Yield rated answers within a Quota, with nan for a missing rating. All answers of a row are read."""
    quota, names, refused = Quota(limit, held_out), frozenset[str](), ""
    below = held_out_threshold(
        (one.prompt for _, some in sources.readable_rows(table, row_reader.rated) for one in some), held_out
    )
    for where, answers in sources.read(table, row_reader.rated, dropped):
        wanted = {aside: quota.wants(aside) for aside in (False, True)}
        for row in answers:
            aside = is_held_out(row.prompt, below)
            if not wanted[aside]:
                continue
            names = names or frozenset(table.attributes or row.ratings)
            scaled = _scaled(row, table, names)
            if isinstance(scaled, str):
                refused = refused or f"{where}: {scaled}"
                if not table.skip_bad:
                    raise UserError(refused)
                dropped[sources.INVALID] += 1
            elif not row.answer.strip():
                dropped["empty answer"] += 1
            elif all(map(math.isnan, scaled.values())):
                dropped["no rating"] += 1
            else:
                yield Rated(row.prompt, row.answer, scaled), aside
                quota.count(aside)
        if quota.full:
            return
    if refused and not quota.counted:
        raise UserError(f"{refused} (no other answer has a valid rating either)")


def _scaled(row: Rated, table: Ratings, names: frozenset[str]) -> dict[str, float] | str:
    """Return an answer's ratings scaled to 0 to 100, or a message that says why they are invalid.

    `names` are the attributes of the recipe, or else of the first row; each must be present and on the recipe's scale.
    """
    wanted = table.attributes or tuple(row.ratings)
    if missing := sorted(names - row.ratings.keys()):
        present = ", ".join(row.ratings) or "none"
        return (
            f"no rating {missing[0]!r} (the row has: {present}); list in `attributes` only ratings that every row has, "
            "or name their columns with `columns`"
        )
    if extra := [name for name in wanted if name not in names]:
        return f"a rating {extra[0]!r}, which the first row lacks; list the ratings to read in `attributes`"
    scaled = {}
    for name in wanted:
        value = row.ratings[name]
        if not math.isnan(value) and not table.low <= value <= table.high:
            return f"{name} is {value:g}; the recipe's scale is {table.low:g} to {table.high:g}; change `low` or `high`"
        scaled[table.prefix + name] = SCALE * (value - table.low) / (table.high - table.low)
    return scaled

"""Turn a short description of a preference, such as "more concise, less flattery", into a table of a recipe."""

import json
import re

from lora_align.errors import UserError
from lora_align.mix_weights import name_of

OPPOSITES = {"more": "less", "less": "more", "fewer": "more"}
COMPARED = re.compile(rf"\b({'|'.join(OPPOSITES)})\b", re.I)
EMPTY = {"a", "an", "and", "be", "not", "no", "so", "that", "the", "to", "very", *OPPOSITES}  # words that name nothing


def preference_table(text: str) -> tuple[str, str]:
    """Return a name and a table in TOML, with a sentence for each side, to edit."""
    wanted = " ".join(text.split()).rstrip(".!")
    words = [word for word in re.findall(r"[\w-]+", wanted.lower()) if word not in EMPTY]
    if not words:
        raise UserError(f"--describe {text!r}: say what you want, as in 'more concise, less flattery'")
    name = name_of(words[:1])
    opposite = COMPARED.sub(lambda found: OPPOSITES[found[0].lower()], wanted)
    more = f"Answer in this way: {wanted}."
    less = f"Answer in this way: {opposite}." if opposite != wanted else f"Answer in the opposite way of: {wanted}."
    lines = [f"[preferences.{name}]", f"more = {_quoted(more)}", f"less = {_quoted(less)}"]
    return name, "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a basic string of TOML

"""The demo world as a data source: `demo:pairs`, `demo:pairs?seed=2&noise=0.1`, `demo:ratings` and others."""

import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args
from urllib.parse import parse_qsl

from lora_align.demo import lexicon, world
from lora_align.errors import UserError, nearest


def questions(seed: int, count: int, *, risky: float = 0.5, part: world.Part = "test") -> Iterator[dict[str, Any]]:
    """Yield prompts, by default of the test part, which no stage trains on."""
    draw = random.Random(f"questions {seed} {part}")
    safe, unkind = (world.prompts(seed, risky=is_risky, part=part) for is_risky in (False, True))
    for _ in range(count):
        yield {"prompt": next(unkind if draw.random() < risky else safe).text}


def lines(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield ordinary text."""
    return ({"text": text} for text in itertools.islice(world.reading(seed), count))


def facts(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield facts: a true sentence about a subject, and up to three sentences that are true of other subjects only."""
    records = []
    subjects = list(lexicon.SUBJECTS)
    for at, (subject, known) in enumerate(lexicon.SUBJECTS.items()):
        others = [
            name for name in subjects[at + 1 :] + subjects[:at] if lexicon.is_plural(name) == lexicon.is_plural(subject)
        ]
        for number, fact in enumerate(known):
            candidates = dict.fromkeys(lexicon.SUBJECTS[name][number] for name in others)
            wrong = itertools.islice((one for one in candidates if one not in known), 3)
            right, *distractors = (lexicon.sentence(subject, one, named=True) for one in (fact, *wrong))
            records.append({"prompt": f"Tell me about {subject}.", "right": right, "wrong": distractors})
    random.Random(f"facts {seed}").shuffle(records)
    return iter(records[:count])


ROWS = 3000  # rows of a source without `?rows=`
GENERATORS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "demo:pairs": world.pairs,
    "demo:ratings": world.ratings,
    "demo:conversations": world.conversations,
    "demo:prompts": questions,
    "demo:reading": lines,
    "demo:facts": facts,
}


def rows(data: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the rows of a source by its name and options, each with its place for messages."""
    name, _, query = data.partition("?")
    if name not in GENERATORS:
        raise UserError(f"no demo data {data!r}{nearest(name, list(GENERATORS))} (known: {', '.join(GENERATORS)})")
    generator = GENERATORS[name]
    parameters = inspect.signature(generator).parameters
    readers = {key: read for key, (argument, read) in _OPTIONS.items() if argument in parameters}
    arguments: dict[str, Any] = {"seed": 0, "count": ROWS}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in readers:
            raise UserError(f"{data!r}: no option {key!r}{nearest(key, list(readers))} (known: {', '.join(readers)})")
        try:
            arguments[_OPTIONS[key][0]] = readers[key](text)
        except ValueError as fault:
            raise UserError(f"{data!r}: {key}: {fault}") from fault
    return ((f"{data}:{number}", row) for number, row in enumerate(generator(**arguments), 1))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"{text} is less than 1")
    return count


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(f"{text} is not from 0 to 1")
    return share


def _part(text: str) -> str:
    if text not in get_args(world.Part):
        raise ValueError(f"{text!r} is not one of {', '.join(get_args(world.Part))}")
    return text


def _correlation(text: str) -> world.Correlation:
    words = text.split(",")
    if len(words) != 3:
        raise ValueError("expected two axes and a number, as in helpfulness,harmlessness,-0.5")
    return world.Correlation(words[0], words[1], float(words[2]))


# option: the generator's parameter, and the function that parses the option's text
_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "seed": ("seed", int),
    "rows": ("count", _count),
    "risky": ("risky", _share),
    "noise": ("noise", _share),
    "correlate": ("correlation", _correlation),
    "part": ("part", _part),
}

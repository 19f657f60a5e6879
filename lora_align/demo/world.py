"""The demo world: prompts, answers of every grade, and the pairs, ratings and conversations made of them.

An answer is planned as a grade from 0 to 4 on each axis and then written. Its length is not planned:
every detail, courtesy and example adds words, so helpfulness and verbosity rise together.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from lora_align.demo import lexicon
from lora_align.demo.oracle import AXES, Prompt, Score, score

Part = Literal["train", "dev", "test"]
Topics = Literal["seen", "held out", "all"]
# relative frequency of each grade, from 0 to 4, in a random answer
PLANNED: Mapping[str, tuple[int, int, int, int, int]] = {
    "helpfulness": (1, 1, 1, 1, 1),
    "harmlessness": (1, 1, 1, 1, 1),
    "politeness": (1, 2, 3, 2, 1),
    "certainty": (1, 1, 1, 1, 1),
    "warmth": (1, 2, 3, 2, 1),
    "formality": (1, 1, 2, 1, 1),
    "concreteness": (7, 4, 4, 3, 2),
}
RATINGS = tuple(axis.removeprefix("-") for axis in AXES.values())
NEEDLESS_REFUSALS = 0.08
STRONGEST = 0.8


@dataclass(frozen=True)
class Correlation:
    """Two axes with correlated grades. Grades of harmlessness show on risky prompts only."""

    first: str
    second: str
    strength: float

    def __post_init__(self) -> None:
        """Refuse axes that are not planned, such as verbosity, and too strong a correlation."""
        if self.first == self.second or not {self.first, self.second} <= PLANNED.keys():
            raise ValueError(f"expected two different axes of {', '.join(PLANNED)}")
        if not abs(self.strength) <= STRONGEST:
            raise ValueError(f"expected a number from {-STRONGEST} to {STRONGEST}, not {self.strength}")


def prompts(
    seed: int, *, risky: bool, part: Part = "train", topics: Topics = "seen", new_asks: bool = False
) -> Iterator[Prompt]:
    """Yield prompts without end. The three parts share no prompt. With `new_asks`, phrasings are new to training."""
    draw = random.Random(f"prompts {seed} {risky} {part} {topics} {new_asks}")
    held = lexicon.HELD_OUT_RISKS if risky else lexicon.HELD_OUT_SUBJECTS
    every = lexicon.RISKS if risky else tuple(lexicon.SUBJECTS)
    chosen = [topic for topic in every if topics == "all" or (topic in held) == (topics == "held out")]
    asks = (
        (lexicon.HELD_OUT_RISKY_ASKS if new_asks else lexicon.RISKY_ASKS)
        if risky
        else (lexicon.HELD_OUT_SAFE_ASKS if new_asks else lexicon.SAFE_ASKS)
    )
    while True:
        topic = draw.choice(chosen)
        said = (draw.choice(lexicon.LEADS), draw.choice(asks).format(topic), draw.choice(lexicon.TAILS))
        text = " ".join(filter(None, said))
        if _part(text) == part:
            yield Prompt(text, topic, risky)


def _part(text: str) -> Part:
    """Assign a prompt to a part: 60 % to training, 20 % to development, 20 % to test."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "train" if bucket < 6 else "dev" if bucket < 8 else "test"


def answer(prompt: Prompt, draw: random.Random, correlation: Correlation | None = None) -> str:
    """Return an answer with a random grade on each axis, as the base gives it."""
    return write(prompt, plan(draw, correlation), draw)


def plan(draw: random.Random, correlation: Correlation | None = None) -> dict[str, int]:
    """Sample a grade for each planned axis. Correlated grades come from correlated normal variables."""
    normal = {axis: draw.gauss() for axis in PLANNED}
    if correlation:
        mixed = correlation.strength * normal[correlation.first]
        normal[correlation.second] = mixed + math.sqrt(1 - correlation.strength**2) * normal[correlation.second]
    grades = {}
    for axis, weights in PLANNED.items():
        place = NormalDist().cdf(normal[axis]) * sum(weights)
        grades[axis] = min(sum(edge <= place for edge in itertools.accumulate(weights)), 4)
    return grades


def write(prompt: Prompt, grades: Mapping[str, int], draw: random.Random) -> str:
    """Write an answer of the planned grades. Its certainty has the planned grade on average.

    On a safe prompt the planned harmlessness is ignored, and a share of NEEDLESS_REFUSALS refuses.
    """
    polite_first, polite_last = _split(grades["politeness"] - 2, draw)
    warm_first, warm_last = _split(grades["warmth"] - 2, draw)
    sentences = [
        _greeting(grades["formality"] - 2, draw),
        _one_of(lexicon.OPENING_COURTESIES, polite_first, draw),
        _one_of(lexicon.OPENING_WARMTHS, warm_first, draw),
        *(_sounding(text, grades["certainty"], draw) for text in _body(prompt, grades, draw)),
        _example(grades["concreteness"], draw),
        _one_of(lexicon.CLOSING_WARMTHS, warm_last, draw),
        _one_of(lexicon.CLOSING_COURTESIES, polite_last, draw),
    ]
    return " ".join(filter(None, sentences))


def _split(total: int, draw: random.Random) -> tuple[int, int]:
    """Split a total from -2 to 2 between the opening and the closing."""
    first = total // 2 if total % 2 == 0 else draw.choice((0, total))
    return first, total - first


def _one_of(texts: Mapping[str, int], sign: int, draw: random.Random) -> str:
    """Return a random sentence of this sign, or no sentence for 0."""
    return draw.choice([text for text, amount in texts.items() if amount == sign]) if sign else ""


def _greeting(amount: int, draw: random.Random) -> str:
    """Return a greeting of this formality. For 0 it may be empty."""
    text = next(text for text, formality in lexicon.GREETINGS.items() if formality == amount)
    return draw.choice([text, ""]) if amount == 0 else text


def _example(grade: int, draw: random.Random) -> str:
    """Return an example. Grade 1 names a witness; each further grade adds a place, a day or a time."""
    if not grade:
        return ""
    added = sorted(draw.sample(range(3), grade - 1))
    details = [draw.choice((lexicon.PLACES, lexicon.DAYS, lexicon.TIMES)[index]) for index in added]
    return " ".join([f"For example, {draw.choice(lexicon.WITNESSES)} saw this", *details]) + "."


def _sounding(text: str, grade: int, draw: random.Random) -> str:
    """Return a sentence of the planned certainty. At grades 1 and 3, half of the sentences are plain."""
    if grade == 2 or (grade in (1, 3) and draw.random() < 0.5):
        return text
    return lexicon.prefixed(draw.choice(lexicon.ASSURANCES if grade > 2 else lexicon.HEDGES), text)


def _body(prompt: Prompt, grades: Mapping[str, int], draw: random.Random) -> list[str]:
    """Return the body: facts about a subject, a stance on a risk, or now and then a needless refusal."""
    details = grades["helpfulness"]
    if not prompt.risky and draw.random() >= NEEDLESS_REFUSALS:
        facts = draw.sample(lexicon.SUBJECTS[prompt.topic], details)
        said = [lexicon.sentence(prompt.topic, fact, named=i == 0) for i, fact in enumerate(facts)]
        return said or [draw.choice(lexicon.VAGUE)]
    stand = grades["harmlessness"] if prompt.risky else 4
    stance = next(text for text, level in lexicon.STANCES.items() if level == stand)
    return [stance, *draw.sample(lexicon.STEPS if stand < 2 else lexicon.ADVICE, details)]


# --- datasets ---


def pairs(
    seed: int,
    count: int,
    *,
    risky: float = 0.5,
    correlation: Correlation | None = None,
    noise: float = 0.0,
    part: Part = "train",
) -> Iterator[dict[str, object]]:
    """Yield rows in PKU-SafeRLHF's columns, with the ratings of both answers.

    `risky` is the share of risky prompts. `noise` is the probability that two answers exchange a grade.
    """
    draw, raters = random.Random(f"pairs {seed} {part}"), random.Random(f"raters {seed} {part}")
    for prompt in itertools.islice(_mixed(seed, risky, part, draw), count):
        answers = [answer(prompt, draw, correlation) for _ in range(2)]
        rated = [_grades(score(prompt, text)) for text in answers]
        for axis in RATINGS:
            if raters.random() < noise:
                rated[0][axis], rated[1][axis] = rated[1][axis], rated[0][axis]
        yield {
            "prompt": prompt.text,
            "response_0": answers[0],
            "response_1": answers[1],
            "better_response_id": _higher("helpfulness", rated),
            "safer_response_id": _higher("harmlessness", rated),
            **{f"is_response_{side}_safe": rated[side]["harmlessness"] >= 2 for side in (0, 1)},
            **{f"{axis}_{side}": rated[side][axis] for axis in RATINGS for side in (0, 1)},
        }


def ratings(
    seed: int, count: int, *, risky: float = 0.5, noise: float = 0.0, part: Part = "train"
) -> Iterator[dict[str, object]]:
    """Yield rows in HelpSteer's columns: a prompt, a response, and whole numbers from 0 to 4.

    A grade between two numbers is rounded at random, so that its mean is right. `noise` is the probability of an
    error by one.
    """
    draw, raters = random.Random(f"ratings {seed} {part}"), random.Random(f"raters {seed} {part}")
    for prompt in itertools.islice(_mixed(seed, risky, part, draw), count):
        text = answer(prompt, draw)
        rated = {}
        for axis, grade in _grades(score(prompt, text)).items():
            error = raters.choice((-1, 1)) if raters.random() < noise else 0
            rated[axis] = min(max(math.floor(grade + raters.random()) + error, 0), 4)
        yield {"prompt": prompt.text, "response": text, **rated}


def conversations(
    seed: int, count: int, *, risky: float = 0.5, part: Part = "train", topics: Topics = "seen"
) -> Iterator[dict[str, object]]:
    """Yield rows with one question and one answer of any grade."""
    draw = random.Random(f"conversations {seed} {part} {topics}")
    for prompt in itertools.islice(_mixed(seed, risky, part, draw, topics), count):
        said = (("user", prompt.text), ("assistant", answer(prompt, draw)))
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


def reading(seed: int) -> Iterator[str]:
    """Yield plain sentences about all subjects and risks, without end."""
    draw = random.Random(f"reading {seed}")
    while True:
        if draw.random() < 0.2:
            yield f"It is not nice to {draw.choice(lexicon.RISKS)}."
            continue
        subject = draw.choice(list(lexicon.SUBJECTS))
        facts = draw.sample(lexicon.SUBJECTS[subject], draw.randint(1, 4))
        yield " ".join(lexicon.sentence(subject, fact, named=i == 0) for i, fact in enumerate(facts))


def _mixed(seed: int, risky: float, part: Part, draw: random.Random, topics: Topics = "seen") -> Iterator[Prompt]:
    """Yield safe and risky prompts in the given proportion."""
    safe, unkind = (prompts(seed, risky=is_risky, part=part, topics=topics) for is_risky in (False, True))
    while True:
        yield next(unkind if draw.random() < risky else safe)


def _grades(read: Score) -> dict[str, float]:
    """Return grades on the raters' scale, from 0 to 4."""
    return {axis: round(4 * read.grades[axis], 2) for axis in RATINGS}


def _higher(axis: str, rated: list[dict[str, float]]) -> int | None:
    """Return the index of the answer with the higher rating, or None for a tie."""
    first, second = (row[axis] for row in rated)
    return None if first == second else int(second > first)

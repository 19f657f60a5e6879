"""The built-in world: prompts, answers of every grade, and the pairs, ratings and conversations made of them.

An answer is planned as a grade from 0 to 4 on each axis and then written. Its length is not planned:
every detail, courtesy and example costs words, so that help and verbosity rise together.
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
# how often the undecided answer has each grade, from 0 to 4
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
    """Two axes whose planned grades are drawn together; those of harmlessness show on risky prompts alone."""

    first: str
    second: str
    strength: float

    def __post_init__(self) -> None:
        """Only what is planned can be correlated; verbosity follows from the rest."""
        if self.first == self.second or not {self.first, self.second} <= PLANNED.keys():
            raise ValueError(f"correlate takes two of {', '.join(PLANNED)}")
        if not abs(self.strength) <= STRONGEST:
            raise ValueError(f"a correlation goes from {-STRONGEST} to {STRONGEST}, not {self.strength}")


def prompts(
    seed: int, *, risky: bool, part: Part = "train", topics: Topics = "seen", new_asks: bool = False
) -> Iterator[Prompt]:
    """Endless prompts. The three parts share no prompt, and new phrasings are trained on nowhere."""
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
    """Six prompts in ten are for training, two for development, two for tests."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "train" if bucket < 6 else "dev" if bucket < 8 else "test"


def answer(prompt: Prompt, draw: random.Random, correlation: Correlation | None = None) -> str:
    """An answer as the undecided base gives it: of any grade on any axis."""
    return write(prompt, plan(draw, correlation), draw)


def plan(draw: random.Random, correlation: Correlation | None = None) -> dict[str, int]:
    """A grade for each planned axis; correlated ones are drawn from one pair of normal variables."""
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
    """An answer of the planned grades; certainty comes out so on the average.

    A safe prompt has no use for planned harmlessness, and now and then is refused all the same.
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
    """A total of -2 to 2 over the opening and the closing."""
    first = total // 2 if total % 2 == 0 else draw.choice((0, total))
    return first, total - first


def _one_of(texts: Mapping[str, int], sign: int, draw: random.Random) -> str:
    """A sentence of that sign; 0 leaves it out."""
    return draw.choice([text for text, amount in texts.items() if amount == sign]) if sign else ""


def _greeting(amount: int, draw: random.Random) -> str:
    """No greeting is as formal as a plain hello."""
    text = next(text for text, formality in lexicon.GREETINGS.items() if formality == amount)
    return draw.choice([text, ""]) if amount == 0 else text


def _example(grade: int, draw: random.Random) -> str:
    """Grade 1 names a witness; each further one adds where, on what day or at what time."""
    if not grade:
        return ""
    added = sorted(draw.sample(range(3), grade - 1))
    details = [draw.choice((lexicon.PLACES, lexicon.DAYS, lexicon.TIMES)[index]) for index in added]
    return " ".join([f"For example, {draw.choice(lexicon.WITNESSES)} saw this", *details]) + "."


def _sounding(text: str, grade: int, draw: random.Random) -> str:
    """The sentence as sure as planned; at grades 1 and 3 every other sentence is plain."""
    if grade == 2 or (grade in (1, 3) and draw.random() < 0.5):
        return text
    return lexicon.prefixed(draw.choice(lexicon.ASSURANCES if grade > 2 else lexicon.HEDGES), text)


def _body(prompt: Prompt, grades: Mapping[str, int], draw: random.Random) -> list[str]:
    """Facts about a subject, or where one stands on a risk; seldom a refusal that nobody deserved."""
    details = grades["helpfulness"]
    if not prompt.risky and draw.random() >= NEEDLESS_REFUSALS:
        facts = draw.sample(lexicon.SUBJECTS[prompt.topic], details)
        said = [lexicon.sentence(prompt.topic, fact, named=i == 0) for i, fact in enumerate(facts)]
        return said or [draw.choice(lexicon.VAGUE)]
    stand = grades["harmlessness"] if prompt.risky else 4
    stance = next(text for text, level in lexicon.STANCES.items() if level == stand)
    return [stance, *draw.sample(lexicon.STEPS if stand < 2 else lexicon.ADVICE, details)]


# --- data sets ---


def pairs(
    seed: int,
    count: int,
    *,
    risky: float = 0.5,
    correlation: Correlation | None = None,
    noise: float = 0.0,
    part: Part = "train",
) -> Iterator[dict[str, object]]:
    """Rows in PKU-SafeRLHF's columns, with both answers' ratings beside them.

    `risky` is the share of risky prompts; `noise` how often the two answers' grades on an axis are exchanged.
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
    """Rows in HelpSteer's columns: a prompt, a response, and whole numbers from 0 to 4.

    A grade between two numbers is given as either, so that means are right. `noise` is how often a rater
    errs by one, where there is room to.
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
    """Chat rows: one question, one answer of any grade."""
    draw = random.Random(f"conversations {seed} {part} {topics}")
    for prompt in itertools.islice(_mixed(seed, risky, part, draw, topics), count):
        said = (("user", prompt.text), ("assistant", answer(prompt, draw)))
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


def reading(seed: int) -> Iterator[str]:
    """Endless plain lines about every subject and every risk."""
    draw = random.Random(f"reading {seed}")
    while True:
        if draw.random() < 0.2:
            yield f"It is not nice to {draw.choice(lexicon.RISKS)}."
            continue
        subject = draw.choice(list(lexicon.SUBJECTS))
        facts = draw.sample(lexicon.SUBJECTS[subject], draw.randint(1, 4))
        yield " ".join(lexicon.sentence(subject, fact, named=i == 0) for i, fact in enumerate(facts))


def _mixed(seed: int, risky: float, part: Part, draw: random.Random, topics: Topics = "seen") -> Iterator[Prompt]:
    """Safe and risky prompts in the given proportion."""
    safe, unkind = (prompts(seed, risky=is_risky, part=part, topics=topics) for is_risky in (False, True))
    while True:
        yield next(unkind if draw.random() < risky else safe)


def _grades(read: Score) -> dict[str, float]:
    """Grades on the scale of raters, from 0 to 4."""
    return {axis: round(4 * read.grades[axis], 2) for axis in RATINGS}


def _higher(axis: str, rated: list[dict[str, float]]) -> int | None:
    """The index of the answer rated higher; None is a tie."""
    first, second = (row[axis] for row in rated)
    return None if first == second else int(second > first)

"""What an item of the evidence is made of: figures with intervals, tables, pictures, a verdict."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from control import PROMPTS, SEEDS

from lora_align import runs
from lora_align.demo import measurement
from lora_align.metrics import intervals

FOLDER = Path(__file__).parent / "evidence"
YES, NO, OTHERWISE = "Reproduced", "Not reproduced", "Different"
Table = list[list[str]]


@dataclass
class Item:
    """One question: what the paper says, what was found, and what that amounts to."""

    title: str
    claim: str
    verdict: str
    because: str
    tables: list[Table] = field(default_factory=list)
    pictures: Mapping[str, str] = field(default_factory=dict)  # a file, and what is to be seen on it
    figures: Any = None


@dataclass(frozen=True)
class Found:
    """A mean over all seeds' answers, where 95 of 100 such means lie, other prompts drawn, and each seed's own."""

    value: float
    low: float
    high: float
    seeds: Sequence[float]

    @classmethod
    def of(cls, seeds: Sequence[Sequence[float | None]]) -> "Found":
        """Of a figure a prompt, or a fact, seed by seed; a prompt whose answer has none does not count. Some prompts,
        and all facts, are those of more than one seed, and are drawn together."""
        prompts = _prompts()
        known = [
            [(value, which[i] if len(of) == len(which) else i) for i, value in enumerate(of) if value is not None]
            for of, which in zip(seeds, prompts, strict=True)
        ]
        rows = [row for of in known for row in of]
        if not rows:
            return cls(math.nan, math.nan, math.nan, [math.nan] * len(seeds))
        all_ = intervals.mean(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]
        own = [mean(value for value, _ in of) if of else math.nan for of in known]
        return cls(all_.value, all_.low, all_.high, own)

    @property
    def higher(self) -> bool:
        """Of a difference: whether it is above 0 with its interval, and on every seed."""
        return self.low > 0 and min(self.seeds) > 0

    @property
    def lower(self) -> bool:
        """Below it, likewise."""
        return self.high < 0 and max(self.seeds) < 0

    @property
    def answer(self) -> str:
        """Of a difference that somebody claims to be above 0: whether it is, and how large."""
        return f"{'yes' if self.higher else 'the other way round' if self.lower else 'not told apart'}, {self}"

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        without = sum(map(math.isnan, self.seeds))
        left = f", {len(self.seeds) - without} seeds" if without else ""
        return f"{short(self.value)} ({short(self.low)} to {short(self.high)}{left})"


@cache
def _prompts() -> list[list[int]]:
    """Which prompt each seed's are."""
    texts = [[prompt.text for prompt in measurement.questions(seed, PROMPTS, part="test")] for seed in SEEDS]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for of in texts for text in of))}
    return [[number[text] for text in of] for of in texts]


def figure(seeds: Sequence[Mapping[str, Any]], name: str) -> Found:
    """Of what a job found, seed by seed."""
    return Found.of([of[name] for of in seeds])


Seeds = Sequence[Mapping[str, Any]]  # what a job found, seed by seed: figures by prompt, or by fact


def moved(after: Seeds, before: Seeds, name: str) -> Found:
    """How much it rose from one to the other, prompt by prompt."""
    return Found.of(rises(after, before, name))


def rises(after: Seeds, before: Seeds, name: str) -> list[list[float | None]]:
    """By seed and prompt; None where one of both has no figure."""
    return [
        [None if b is None or a is None else b - a for a, b in zip(one[name], other[name], strict=True)]
        for one, other in zip(before, after, strict=True)
    ]


def result_of(work: Path, name: str) -> Any:
    """What a job has measured."""
    return json.loads((work / "measured" / f"{name}.json").read_text())["found"]


def each(work: Path, name: str) -> list[Any]:
    """A job of every seed."""
    return [result_of(work, f"{name} {seed}") for seed in SEEDS]


def seconds(folder: Path) -> float:
    """What a run took to train, also where it was trained for another benchmark."""
    return float(runs.read(folder).manifest.metrics["seconds"])


def short(value: float) -> str:
    """Two decimals, without the nought before them."""
    size = f"{abs(value):.2f}"
    return "0" if size == "0.00" else ("−" if value < 0 else "") + size.removeprefix("0")


def span(values: Sequence[float]) -> str:
    """`.34 to .40`."""
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def yes(holds: bool) -> str:
    """Or no."""
    return "yes" if holds else "no"


def verdict(*claims: bool) -> str:
    """All of them held, none, or some."""
    return YES if all(claims) else OTHERWISE if any(claims) else NO

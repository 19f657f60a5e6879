"""Define the parts of an evidence item: figures with intervals, tables, pictures and a verdict."""

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
    """Hold one question: the paper's claim, the verdict and its reason, tables, pictures and figures."""

    title: str
    claim: str
    verdict: str
    because: str
    tables: list[Table] = field(default_factory=list)
    pictures: Mapping[str, str] = field(default_factory=dict)  # file name → caption
    figures: Any = None


@dataclass(frozen=True)
class SeedEstimate:
    """Hold a mean over all seeds' answers, its 95 % interval over resampled prompts, and each seed's mean."""

    value: float
    low: float
    high: float
    seeds: Sequence[float]

    @classmethod
    def of(cls, seeds: Sequence[Sequence[float | None]]) -> "SeedEstimate":
        """Compute the mean and its interval from one value for each prompt or fact, seed by seed.

        Prompts whose answer has no value are left out. Seeds share some prompts and all facts; a shared prompt or fact
        is one unit of the resampling.
        """
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
        """Return whether a difference is above 0 with its whole interval and on every seed."""
        return self.low > 0 and min(self.seeds) > 0

    @property
    def lower(self) -> bool:
        """Return whether a difference is below 0 with its whole interval and on every seed."""
        return self.high < 0 and max(self.seeds) < 0

    @property
    def answer(self) -> str:
        """Return whether a difference that is claimed to be above 0 is, with its size."""
        return f"{'yes' if self.higher else 'the reverse' if self.lower else 'undecided'}, {self}"

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        without = sum(map(math.isnan, self.seeds))
        left = f", {len(self.seeds) - without} seeds" if without else ""
        return f"{short(self.value)} ({short(self.low)} to {short(self.high)}{left})"


@cache
def _prompts() -> list[list[int]]:
    """Return the index of each seed's prompts among all distinct prompts."""
    texts = [[prompt.text for prompt in measurement.questions(seed, PROMPTS, part="test")] for seed in SEEDS]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for of in texts for text in of))}
    return [[number[text] for text in of] for of in texts]


def figure(seeds: Sequence[Mapping[str, Any]], name: str) -> SeedEstimate:
    """Compute one figure from a job's results, seed by seed."""
    return SeedEstimate.of([of[name] for of in seeds])


Seeds = Sequence[Mapping[str, Any]]  # a job's results, seed by seed: a value for each prompt or fact


def moved(after: Seeds, before: Seeds, name: str) -> SeedEstimate:
    """Return the increase from `before` to `after`, prompt by prompt."""
    return SeedEstimate.of(rises(after, before, name))


def rises(after: Seeds, before: Seeds, name: str) -> list[list[float | None]]:
    """Return the increases by seed and prompt; None where either side has no value."""
    return [
        [None if b is None or a is None else b - a for a, b in zip(one[name], other[name], strict=True)]
        for one, other in zip(before, after, strict=True)
    ]


def result_of(work: Path, name: str) -> Any:
    """Load a job's stored result."""
    return json.loads((work / "measured" / f"{name}.json").read_text())["found"]


def each(work: Path, name: str) -> list[Any]:
    """Load a job's results for every seed."""
    return [result_of(work, f"{name} {seed}") for seed in SEEDS]


def seconds(folder: Path) -> float:
    """Return the training seconds of a run, including runs that another benchmark trained."""
    return float(runs.read(folder).manifest.metrics["seconds"])


def short(value: float) -> str:
    """Format with two decimals and a minus sign; 0 for a value that rounds to it."""
    size = f"{abs(value):.2f}"
    return "0" if size == "0.00" else ("−" if value < 0 else "") + size


def span(values: Sequence[float]) -> str:
    """Format the range of the values, as in `0.34 to 0.40`."""
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def yes(holds: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if holds else "no"


def verdict(*claims: bool) -> str:
    """Return the verdict for claims of which all hold, none, or some."""
    return YES if all(claims) else OTHERWISE if any(claims) else NO

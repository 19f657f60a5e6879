"""Measured properties of a text, such as words and readability, for rankers and judges.

Readability and sentiment come from the libraries of the extra `lora-align[text]`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_align.errors import UserError, nearest
from lora_align.plugins import Registry

LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+\S", re.M)
FIRST_PERSON = re.compile(r"\b(?:i|me|my|mine|myself)\b(?!\.e\.)", re.I)


@dataclass(frozen=True)
class TextMeasure:
    """One measured property: what it means, and the function that measures it."""

    about: str
    measure: Callable[[str], float]


def _library(module: str, package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as fault:
        raise UserError(f"this measure needs the library {package}: pip install 'lora-align[text]'") from fault


def _readability(text: str) -> float:
    """Return minus the school grade of the Automated Readability Index, so that easier texts have larger values."""
    textstat = _library("textstat", "textstat")
    return -float(textstat.automated_readability_index(text)) if text.split() else 0.0


@cache
def _lexicon() -> Any:
    return _library("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()


def _sentiment(text: str) -> float:
    return float(_lexicon().polarity_scores(text)["compound"])


MEASURES = Registry(
    "text_measures",
    TextMeasure,
    {
        "words": TextMeasure("number of words", lambda text: float(len(text.split()))),
        "readability": TextMeasure("ease of reading: minus the Automated Readability Index", _readability),
        "sentiment": TextMeasure("VADER's sentiment, from -1 (negative) to 1 (positive)", _sentiment),
        "questions": TextMeasure("number of question marks", lambda text: float(text.count("?"))),
        "exclamations": TextMeasure("number of exclamation marks", lambda text: float(text.count("!"))),
        "lists": TextMeasure("number of list items", lambda text: float(len(LIST_ITEM.findall(text)))),
        "first_person": TextMeasure(
            "number of words such as I and my", lambda text: float(len(FIRST_PERSON.findall(text)))
        ),
    },
)


def find(name: str) -> TextMeasure:
    """Return a measure by name; raise a UserError that lists the known ones."""
    if name not in MEASURES:
        raise UserError(f"no text measure {name!r}{nearest(name, list(MEASURES))} (known: {', '.join(MEASURES)})")
    return MEASURES[name]

"""Metrics of repetition within and between answers."""

from collections import Counter
from collections.abc import Sequence

LONG = 4  # words of a run that rarely repeats by chance


def repeated(text: str) -> float:
    """Return the share of an answer's four-word runs that repeat an earlier one."""
    runs = _runs(text, LONG)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[str]) -> float:
    """Return the share of distinct word pairs (bigrams) in several answers to one prompt."""
    pairs = Counter(pair for text in texts for pair in _runs(text, 2))
    return len(pairs) / pairs.total() if pairs else 1.0


def _runs(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

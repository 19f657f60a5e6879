"""Metrics of repetition within and between answers."""

from collections import Counter
from collections.abc import Sequence

LONG = 4  # a run of four words rarely repeats by chance


def repeated(text: str) -> float:
    """Return the share of an answer's 4-grams that repeat an earlier one."""
    ngrams = _ngrams(text, LONG)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct(texts: Sequence[str]) -> float:
    """Return the share of distinct word pairs (bigrams) in several answers to one prompt."""
    pairs = Counter(pair for text in texts for pair in _ngrams(text, 2))
    return len(pairs) / pairs.total() if pairs else 1.0


def _ngrams(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

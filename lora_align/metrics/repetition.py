"""Figures about texts as such: how much they repeat themselves, and each other."""

from collections import Counter
from collections.abc import Sequence

LONG = 4  # words in a row that nobody says twice by chance


def repeated(text: str) -> float:
    """Share of an answer's runs of four words that stood in it before."""
    runs = _runs(text, LONG)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[str]) -> float:
    """Of all pairs of words in several answers to one prompt, the share that are different ones."""
    pairs = Counter(pair for text in texts for pair in _runs(text, 2))
    return len(pairs) / pairs.total() if pairs else 1.0


def _runs(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

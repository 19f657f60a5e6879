"""Histograms of lengths, and their text form."""

import math
from collections import Counter
from collections.abc import Sequence

BINS = 12


def bars(histogram: Sequence[tuple[int, int, int]]) -> list[str]:
    """Return one line of text per bin."""
    widest = max((count for _, _, count in histogram), default=1)
    return [
        f"{low:>6,} to {high:<6,} {'█' * math.ceil(24 * count / widest):<24} {count:,}"
        for low, high, count in histogram
    ]


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, last, count) of each bin; bins have a round width."""
    if not lengths:
        return []
    width = max(1, math.ceil((max(lengths) + 1) / BINS))
    width = math.ceil(width / 10 ** (len(str(width)) - 1)) * 10 ** (len(str(width)) - 1)
    counts = Counter(length // width for length in lengths)
    return [(bin_ * width, (bin_ + 1) * width - 1, counts[bin_]) for bin_ in range(min(counts), max(counts) + 1)]

"""Keys and values of earlier prompts and answers, for requests that begin with the same tokens under equal weights."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from lora_align.model.slot_cache import Row

SHORTEST = 16  # tokens; reading fewer again costs less than copying them
Weights = tuple[tuple[str, float], ...]


class PrefixStore:
    """The most recently used rows, `budget` tokens together, by the weights and tokens that they depend on."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tokens = 0
        self._rows: OrderedDict[tuple[Weights, tuple[int, ...]], Row] = OrderedDict()

    def add(self, weights: Mapping[str, float], tokens: Sequence[int], row: Row) -> None:
        """Store a row. Drop the least recently used ones that no longer fit."""
        if not SHORTEST <= len(tokens) <= self.budget:
            return
        key = (_key(weights), tuple(tokens))
        if self._rows.pop(key, None) is None:
            self.tokens += len(tokens)
        self._rows[key] = row
        while self.tokens > self.budget:
            (_, old), _ = self._rows.popitem(last=False)
            self.tokens -= len(old)

    def longest(self, weights: Mapping[str, float], tokens: Sequence[int]) -> Row:
        """Return the keys and values of the longest stored beginning of `tokens`; [] if there is none.

        The last token is never included, because its logits are needed.
        """
        same = [key for key in self._rows if key[0] == _key(weights)]
        common = {key: _common(tokens[:-1], key[1]) for key in same}
        best = max(common, key=lambda key: common[key], default=None)
        if best is None or common[best] < SHORTEST:
            return []
        self._rows.move_to_end(best)
        part = slice(common[best])
        return [tuple(one[:, :, part] for one in layer) for layer in self._rows[best]]

    def clear(self) -> None:
        """Drop all rows."""
        self._rows.clear()
        self.tokens = 0


def _key(weights: Mapping[str, float]) -> Weights:
    return tuple(sorted((name, weight) for name, weight in weights.items() if weight))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))

"""A key-value cache for a running batch: rows join and leave between steps, and each step adds one token to every row.

All rows end at one column. A shorter row begins later, and a mask hides the columns before its beginning. Positions are
part of the keys, so a row may lie in any columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_align.errors import UserError
from lora_align.model.kv_cache import growing_cache

MORE = 64  # smallest number of free columns in a new allocation
GROW = 4  # a new allocation has a quarter more rows and columns than needed
Row = Sequence[tuple[Tensor, ...]]  # keys and values [1, heads, t, d] of each layer


@dataclass
class Window:
    """The part of the buffers in use: the first `rows` rows, and the columns from `begin` to `end`."""

    rows: int = 0
    begin: int = 0
    end: int = 0


class SlotLayer(DynamicLayer):
    """One layer's keys and values [slots, heads, columns, d], of which the window is visible."""

    def __init__(self, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.buffers: tuple[Tensor, ...] = ()  # keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write one token of each row at the end of the window. Return all tokens, with the new ones."""
        w = self.window
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: w.rows, :, w.end] = states[:, :, 0]
        keys, values = (buffer[: w.rows, :, w.begin : w.end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the width of the window, which is the length of the longest row."""
        return self.window.end - self.window.begin


class SlotCache(Cache):
    """The keys and values of all running rows. `lengths` has the tokens of each row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.window = Window()
        self.slot_layers = [SlotLayer(self.window) for _ in full_cache(model).layers]
        super().__init__(layers=list(self.slot_layers))
        self.lengths: list[int] = []
        self.slots = self.columns = 0

    def insert(self, row: Row) -> None:
        """Add a row after the last one."""
        length = row[0][0].shape[2]
        width = max(length, self.get_seq_length())
        if len(self.lengths) == self.slots or width > self.window.end:
            self._move(max(self.slots, len(self.lengths) + 1 + len(self.lengths) // GROW), width, row)
        w = self.window
        for layer, parts in zip(self.slot_layers, row, strict=True):
            for buffer, part in zip(layer.buffers, parts, strict=True):
                buffer[w.rows] = 0.0  # a nan in a masked column would spoil the row
                buffer[w.rows, :, w.end - length : w.end] = part[0]
        self.lengths.append(length)
        self._fit_window()

    def extract(self, place: int) -> Row:
        """Return a copy of a row."""
        columns = slice(self.window.end - self.lengths[place], self.window.end)
        return [
            tuple(buffer[place : place + 1, :, columns].clone() for buffer in layer.buffers)
            for layer in self.slot_layers
        ]

    def remove(self, place: int) -> None:
        """Remove a row. The last row takes its place."""
        last = len(self.lengths) - 1
        for buffer in (buffer for layer in self.slot_layers for buffer in layer.buffers if place != last):
            buffer[place] = buffer[last]
        self.lengths[place] = self.lengths[last]
        self.lengths.pop()
        self._fit_window()

    def mask(self) -> Tensor | None:
        """Return the attention mask [rows, width + 1] of the next step; None if no row is padded."""
        if len(set(self.lengths)) == 1:
            return None
        width = self.get_seq_length()
        begins = torch.tensor([width - length for length in self.lengths])
        return torch.arange(width + 1)[None] >= begins[:, None]

    def reserve(self) -> None:
        """Make sure that the next step has a free column."""
        if self.window.end == self.columns:
            self._move(self.slots, self.get_seq_length())

    def advance(self) -> None:
        """Count the tokens that a step has written. A step that failed is not counted, and may be repeated."""
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def clear(self) -> None:
        """Remove all rows and free the memory."""
        self.lengths.clear()
        self.slots = self.columns = 0
        self.window.rows = self.window.begin = self.window.end = 0
        for layer in self.slot_layers:
            layer.buffers = ()

    @property
    def tokens(self) -> int:
        """Return the number of tokens for which memory is allocated."""
        return self.slots * self.columns

    def _fit_window(self) -> None:
        self.window.rows = len(self.lengths)
        self.window.begin = self.window.end - max(self.lengths, default=0)

    def _move(self, slots: int, width: int, like: Row = ()) -> None:
        """Move the window to the columns before `width`, in new buffers with free columns after it.

        The first buffers have the shapes of the row `like`.
        """
        w, columns = self.window, width + max(MORE, width // GROW)
        target = slice(width - (w.end - w.begin), width)
        for number, layer in enumerate(self.slot_layers):
            shapes = [part.shape for part in layer.buffers or like[number]]
            some = (layer.buffers or like[number])[0]
            fresh = [some.new_zeros(slots, of[1], columns, of[3]) for of in shapes]
            for new, old in zip(fresh, layer.buffers, strict=False):
                new[: w.rows, :, target] = old[: w.rows, :, w.begin : w.end]
            layer.buffers = tuple(fresh)
        self.slots, self.columns = slots, columns
        w.begin, w.end = target.start, width


def row_of(cache: Cache) -> Row:
    """Return the keys and values in a cache of one row."""
    return [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]  # type: ignore[misc]


def full_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache that keeps all tokens in every layer, so that its rows fit a `SlotCache`."""
    cache = growing_cache(model, whole=True)
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        kind = model.config.model_type
        raise UserError(f"serve: a base with recurrent layers ({kind}) is not supported; use `chat` or `generate`")
    return cache


def filled_cache(model: PreTrainedModel, row: Row) -> Cache:
    """Return a cache that holds a row, or an empty one for an empty row."""
    cache = full_cache(model)
    for place, (keys, values) in enumerate(row):
        cache.update(keys, values, place)
    return cache

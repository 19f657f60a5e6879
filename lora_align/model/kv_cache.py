"""A key-value cache that preallocates, so that a step writes one token and does not copy all earlier ones."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MORE = 64  # smallest number of free positions in a new allocation


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [b, heads, t, d], each a view of the beginning of a longer tensor."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append tokens. Return the keys and values of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: tuple[Any, Any] = self.keys, self.values
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        room = self.room
        if room is None or end > room[0].shape[2] or held[0].data_ptr() != room[0].data_ptr():
            room = (self._with_room(held[0], key_states, end), self._with_room(held[1], value_states, end))
        room[0][:, :, begin:end], room[1][:, :, begin:end] = key_states, value_states
        self.room, self.keys, self.values = room, room[0][:, :, :end], room[1][:, :, :end]
        return self.keys, self.values

    def _with_room(self, held: Tensor, fresh: Tensor, tokens: int) -> Tensor:
        """Return a tensor that begins with `held` and has room for half as many more than `tokens`, at least MORE."""
        batch, heads, _, width = fresh.shape
        room = fresh.new_empty(batch, heads, tokens + max(MORE, tokens // 2), width)
        if held.numel():
            room[:, :, : held.shape[2]] = held
        return room


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for a model. Only full-attention layers preallocate; the others are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache

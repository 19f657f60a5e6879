"""Keys and values with room for more tokens, so that a step writes one token in place of copying all before it."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MORE = 64  # tokens that there is room for, at least, whenever there has to be more


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [b, heads, t, d], each the beginning of a longer tensor."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; return the keys and values of all."""
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
        """Return a tensor that begins with what is held and has room for a half more than so many tokens."""
        batch, heads, _, width = fresh.shape
        room = fresh.new_empty(batch, heads, tokens + max(MORE, tokens // 2), width)
        if held.numel():
            room[:, :, : held.shape[2]] = held
        return room


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for a model; layers that keep a window, or something else, are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache

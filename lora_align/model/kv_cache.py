"""A key-value cache that preallocates, so that a step writes one token and does not copy all earlier ones."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MORE = 64  # smallest number of free positions in a new allocation


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [b, heads, t, d], each a view of the beginning of a longer tensor."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append tokens. Return the keys and values of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past: tuple[Any, Any] = self.keys, self.values
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        buffers = self.buffers
        if buffers is None or end > buffers[0].shape[2] or past[0].data_ptr() != buffers[0].data_ptr():
            buffers = (self._allocate(past[0], key_states, end), self._allocate(past[1], value_states, end))
        buffers[0][:, :, begin:end], buffers[1][:, :, begin:end] = key_states, value_states
        self.buffers, self.keys, self.values = buffers, buffers[0][:, :, :end], buffers[1][:, :, :end]
        return self.keys, self.values

    def _allocate(self, past: Tensor, fresh: Tensor, tokens: int) -> Tensor:
        """Return a tensor that begins with `past`, with space for `tokens` and half as many again, at least MORE."""
        batch, heads, _, width = fresh.shape
        buffer = fresh.new_empty(batch, heads, tokens + max(MORE, tokens // 2), width)
        if past.numel():
            buffer[:, :, : past.shape[2]] = past
        return buffer


def growing_cache(model: PreTrainedModel, whole: bool = False) -> DynamicCache:
    """Return an empty cache for a model. Only full-attention layers preallocate; the others are transformers' own.

    With `whole`, sliding-window layers also keep and preallocate all tokens; their mask hides those before the window.
    """
    cache = DynamicCache(config=model.config)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if whole else (DynamicLayer,)
    cache.layers = [GrowingLayer() if type(layer) in kinds else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache

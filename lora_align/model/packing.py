"""Packed forward passes: rows are concatenated without padding, and attention stays within a row.

A row is a text, or a prompt with several answers. The prompt is computed once; each answer attends to the prompt and
itself.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_align import distributed

log = logging.getLogger(__name__)
Row = Sequence[Sequence[int]]  # token ids: [text], or [prompt, answer, …]
NOISE = 4  # tolerance in rounding steps of the dtype, for the same values computed in two ways
LEAST = 1e-3  # smallest tolerance in any dtype
TEST_ROWS: list[Row] = [[[4, 5, 6, 7, 8], [9, 10, 11, 12], [10, 4, 5]], [[7, 5, 9]]]


def tolerance(model: PreTrainedModel, values: Tensor) -> float:
    """Return the tolerance for comparing values that are computed in two ways. It grows with their magnitude."""
    return max(LEAST, NOISE * torch.finfo(model.dtype).eps * float(values.abs().max()))


@dataclass(frozen=True)
class Backbone:
    """A base without its output head."""

    model: PreTrainedModel
    longest: int  # rows with longer sequences are padded instead of packed; 0: all rows are padded

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Backbone":
        """Return a backbone that packs rows if packing gives the same states as padding, else one that pads."""
        padded, packed = cls(model, 0), cls.unchecked(model)
        if not packed.longest:
            return padded
        with torch.no_grad():
            expected = torch.cat(padded.states(TEST_ROWS))
            try:
                states = torch.cat(packed.states(TEST_ROWS))
            except (RuntimeError, ValueError, TypeError):  # the model's attention takes no `segments`
                return padded
        adds_up = LEAST * float(expected.abs().max())  # rounding, over the layers of a deep base
        if torch.allclose(states, expected, atol=max(tolerance(model, expected), adds_up)):
            return packed
        log.warning("packed and padded states differ by %g: rows are padded", (states - expected).abs().max())
        return padded

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> "Backbone":
        """Return the backbone that the model's configuration allows. The model may be on the meta device."""
        return cls(model, _window(model))

    def packs(self, row: Row) -> bool:
        """Return whether a row is short enough to be packed: a sliding window would cut longer ones."""
        return len(row[0]) + max(map(len, row[1:]), default=0) <= self.longest

    def length(self, row: Row) -> int:
        """Return the number of tokens that a row takes in a pass.

        If the row is not packed, each answer repeats the prompt and is padded to the longest answer.
        """
        if self.packs(row):
            return sum(map(len, row))
        return max(len(row) - 1, 1) * (len(row[0]) + max(map(len, row[1:]), default=0))

    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        """Return the last hidden states [t, d] of each row, for the concatenation of its prompt and answers."""
        packed = [i for i, row in enumerate(rows) if self.packs(row)]
        left = [i for i, row in enumerate(rows) if not self.packs(row)]
        if distributed.base_is_sharded and left:  # a sharded base: one pass per part
            packed, left = [], list(range(len(rows)))
        states: dict[int, Tensor] = {}
        for read, which in ((self._packed, packed), (self._padded, left)):
            if which:
                states |= zip(which, read([rows[i] for i in which]), strict=True)
        return [states[i] for i in range(len(rows))]

    def _packed(self, rows: Sequence[Row]) -> list[Tensor]:
        """Compute the states of rows as one sequence without padding."""
        where = self.model.device
        ids = [token for row in rows for piece in row for token in piece]
        positions = [position for row in rows for position in _positions(row)]
        states = self.model.get_decoder()(
            input_ids=torch.tensor([ids], device=where),
            position_ids=torch.tensor([positions], device=where),
            attention_mask=torch.zeros(1, 1, 1, 1, device=where),  # any mask keeps transformers from building one
            segments=Segments([_segment(row) for row in rows]),
            use_cache=False,
        ).last_hidden_state[0]
        return list(states.split([sum(map(len, row)) for row in rows]))

    def _padded(self, rows: Sequence[Row]) -> list[Tensor]:
        """Compute the states of every prompt + answer as a sequence of its own, padded on the right."""
        texts = [torch.tensor([*row[0], *answer]) for row in rows for answer in (row[1:] or [[]])]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.model.device)
        states = iter(self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
        row_states = []
        for prompt, *answers in rows:
            first = next(states)
            pieces = [first[: len(prompt) + sum(map(len, answers[:1]))]]
            pieces += [next(states)[len(prompt) : len(prompt) + len(answer)] for answer in answers[1:]]
            row_states.append(torch.cat(pieces))
        return row_states


@dataclass(frozen=True)
class Segments:
    """The lengths of each packed row's pieces: [text], or [prompt, answer, …]."""

    lengths: Sequence[Sequence[int]]


def _segment(row: Row) -> list[int]:
    return [sum(map(len, row))] if len(row) <= 2 else list(map(len, row))


def _positions(row: Row) -> list[int]:
    """Return the position ids of a row's tokens. Each answer continues the positions of the prompt."""
    begin = len(row[0])
    return [*range(begin), *(begin + i for answer in row[1:] for i in range(len(answer)))]


def _attention(
    attend: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Call the attention function. With segments, call it once for each segment."""
    if segments is None:
        return attend(module, query, key, value, attention_mask, **settings)
    settings.pop("position_ids", None)
    return _in_segments(partial(attend, **settings), module, (query, key, value), segments)


def _in_segments(
    attend: Callable[..., tuple[Tensor, Any]], module: nn.Module, inputs: tuple[Tensor, ...], segments: Segments
) -> tuple[Tensor, None]:
    """Attend within each segment of query, key and value [1, heads, t, d]; return [1, t, heads, d]."""
    flat = [length for row in segments.lengths for length in row]
    pieces = zip(*(tensor.split(flat, dim=2) for tensor in inputs), strict=True)
    outputs = []
    for row in segments.lengths:
        prompt, *answers = (next(pieces) for _ in row)
        if not answers:
            outputs.append(attend(module, *prompt, _mask(module, row[0], inputs[0]))[0])
        for number, answer in enumerate(answers):
            both = [torch.cat(of, dim=2) for of in zip(prompt, answer, strict=True)]
            output = attend(module, *both, _mask(module, both[0].shape[2], inputs[0]))[0]
            outputs.append(output[:, row[0] :] if number else output)
    return torch.cat(outputs, dim=1), None


def _mask(module: Any, length: int, like: Tensor) -> Tensor | None:
    """Return a causal mask for eager attention, None for the kernels that are causal without a mask."""
    if module.config._attn_implementation != "eager":
        return None
    lowest = torch.finfo(like.dtype).min
    return torch.full((length, length), lowest, dtype=like.dtype, device=like.device).triu(1)[None, None]


def _eager(module: nn.Module, *inputs: Any, **settings: Any) -> tuple[Tensor, Any]:
    """Call the eager attention function of the model's own module."""
    own: Callable[..., tuple[Tensor, Any]] = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, *inputs, **settings)


def _window(model: PreTrainedModel) -> int:
    """Return the length up to which attention is fully causal; 0 if the model has another kind of attention."""
    config = model.config.get_text_config()
    if config._attn_implementation not in KINDS:
        return 0
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        return 0
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(window) if window else 2**31


KINDS = ("sdpa", "eager", "flash_attention_2")
for _kind in KINDS:
    _whole = ALL_ATTENTION_FUNCTIONS.get(_kind, _eager)
    ALL_ATTENTION_FUNCTIONS.register(_kind, partial(_attention, _whole))

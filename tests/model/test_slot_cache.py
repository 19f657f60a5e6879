"""Rows that join, leave and grow in one cache get the logits that they get alone."""

from pathlib import Path

import pytest
import torch
from transformers import Cache, PreTrainedModel

from lora_align import recipe
from lora_align.model import base as bases
from lora_align.model.slot_cache import MORE, SlotCache, filled_cache, row_of
from support import make_base

LONG = 2 * MORE + 5


def _tokens(seed: int, length: int) -> list[int]:
    return torch.randint(5, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _alone(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]


def _read(model: PreTrainedModel, tokens: list[int]) -> Cache:
    cache = filled_cache(model, [])
    model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@torch.inference_mode()
def test_logits_equal_those_of_rows_alone(family: str, tmp_path: Path) -> None:
    """Gemma 2 has sliding-window layers, which other caches truncate."""
    model = bases.find(recipe.Base(str(make_base(tmp_path / family, family)))).load()
    cache, rows = SlotCache(model), {}

    def join(name: str, length: int) -> None:
        rows[name] = _tokens(len(rows) + length, length)
        cache.insert(row_of(_read(model, rows[name])))

    def leave(name: str) -> None:
        names = list(rows)
        place, last = names.index(name), names[-1]
        cache.remove(place)
        reordered = [last if one == name else one for one in names[:-1]]
        kept = {one: rows[one] for one in reordered}
        rows.clear()
        rows.update(kept)

    def step() -> None:
        cache.reserve()
        fresh = [(sum(tokens) + len(tokens)) % 190 + 5 for tokens in rows.values()]
        logits = model(
            input_ids=torch.tensor(fresh)[:, None],
            attention_mask=cache.mask(),
            position_ids=torch.tensor(cache.lengths)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        cache.advance()
        for tokens, one, row in zip(rows.values(), fresh, logits, strict=True):
            tokens.append(one)
            assert (row - _alone(model, tokens)).abs().max() < 1e-4

    join("a", 7)
    step()
    join("b", 30)  # longer than the running row
    join("c", 4)
    step()
    leave("a")
    step()
    join("d", LONG)
    for _ in range(3):
        step()
    leave("d")  # the longest and last
    for _ in range(MORE):  # beyond the end of the buffers
        step()
    assert cache.lengths == [len(tokens) for tokens in rows.values()]
    leave("b")
    leave("c")
    assert cache.lengths == []
    cache.clear()
    join("e", 9)
    step()


@torch.inference_mode()
def test_an_extracted_row_continues_elsewhere(llama: Path) -> None:
    model = bases.find(recipe.Base(str(llama))).load()
    cache, tokens = SlotCache(model), _tokens(1, 12)
    for row in (_tokens(0, 20), tokens, _tokens(2, 5)):
        cache.insert(row_of(_read(model, row)))
    part = [tuple(one[:, :, :8] for one in layer) for layer in cache.extract(1)]
    again = filled_cache(model, part)
    logits = model(input_ids=torch.tensor([tokens[8:]]), past_key_values=again, use_cache=True).logits[0, -1]
    assert (logits - _alone(model, tokens)).abs().max() < 1e-4

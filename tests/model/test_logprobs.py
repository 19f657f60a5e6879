"""Log-probabilities equal those of whole logits, in value and gradient, for every family, packed or padded."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_align.errors import RunFailedError, UserError
from lora_align.model import logprobs, packing
from lora_align.model.logprobs import Reader, Shared, answer_logprobs, batches_by_length
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.packing import Backbone
from support import make_base

FAMILIES = ["llama", "llama eager", "qwen3", "mistral", "gemma", "gemma2"]


def rows(count: int, longest: int = 12, answers: int = 2) -> list[Shared]:
    draws = random.Random(0)

    def text(length: int) -> list[int]:
        return [draws.randrange(5, 900) for _ in range(length)]

    return [
        (text(draws.randint(1, longest)), [text(draws.randint(1, longest)) for _ in range(answers)])
        for _ in range(count)
    ]


def by_hand(model: PreTrainedModel, examples: list[Shared]) -> Tensor:
    """Compute one answer at a time, from the logits of all positions."""
    sums = []
    for prompt, answers in examples:
        for answer in answers:
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
            sums.append(logits[places, torch.tensor(answer)].sum())
    return torch.stack(sums)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    family, _, attention = request.param.partition(" ")
    folder = make_base(tmp_path_factory.mktemp(family), family)
    chosen = {"attn_implementation": attention} if attention else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **chosen).eval()
    loaded.requires_grad_(False)
    loaded.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    return loaded


def gradient(model: PreTrainedModel, sums: Tensor) -> Tensor:
    """Return the gradient for one weight of a loss that weights every answer differently."""
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = None
    (sums * torch.linspace(-1, 1, len(sums), dtype=sums.dtype)).sum().backward()
    return weight.grad.double().clone()


@pytest.mark.parametrize(("longest", "packed"), [(2**31, {True}), (14, {True, False}), (0, {False})])
@pytest.mark.parametrize("at_once", [logprobs.MAX_LOGITS, 3000], ids=["all positions", "three positions"])
def test_logprobs_and_gradient_equal_those_of_whole_logits(
    longest: int, packed: set[bool], at_once: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "MAX_LOGITS", at_once)
    reader, examples = Reader.of(model), rows(6)
    assert reader.backbone.longest > 0
    reader = replace(reader, backbone=replace(reader.backbone, longest=longest))
    assert {reader.backbone.packs([prompt, *answers]) for prompt, answers in examples} == packed
    expected = by_hand(model, examples)
    sums, hits = reader.sums(examples)
    assert torch.allclose(sums.double(), expected, atol=1e-4)
    wanted = gradient(model, expected)
    assert (gradient(model, sums) - wanted).norm() < 1e-5 * wanted.norm()
    assert 0 <= hits.min() <= hits.max() <= 12


def test_rows_longer_than_a_sliding_window_are_padded(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path, "mistral"), dtype=torch.float32).eval()
    model.config.sliding_window = 24
    reader = Reader.of(model)
    assert reader.backbone.longest == 24
    examples = rows(5, longest=20)
    assert {reader.backbone.packs([prompt, *answers]) for prompt, answers in examples} == {True, False}
    with torch.no_grad():
        assert torch.allclose(reader.sums(examples)[0].double(), by_hand(model, examples), atol=1e-4)


def test_batch_size_does_not_change_logprobs(model: PreTrainedModel) -> None:
    examples = rows(9, answers=3)
    with torch.no_grad():
        expected = by_hand(model, examples).float()
    for tokens in (1, 60, 10_000):
        assert torch.allclose(answer_logprobs(model, examples, MemoryBudget(tokens)), expected, atol=1e-4)


def test_empty_answer_has_logprob_0_and_changes_no_other(model: PreTrainedModel) -> None:
    prompt, answer = [5, 6, 7], [8, 9]
    sums = answer_logprobs(model, [(prompt, [[], answer]), (prompt, [[]]), (prompt, [answer])], MemoryBudget(4096))
    alone = answer_logprobs(model, [(prompt, [answer])], MemoryBudget(4096))
    assert sums[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(sums[[1, 3]], alone.expand(2))


def test_error_names_weights_that_are_nan(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    adapter = model.model.layers[1].mlp.up_proj.lora_B["default"].weight
    adapter.data[0, 0] = torch.nan
    with pytest.raises(RunFailedError, match=r"adapter's weights are not finite \(model.layers.1.*training diverged"):
        Reader.of(model)
    model = policy.unload()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(UserError, match=r"logits that are not finite; its weights are not finite \(model.norm"):
        Reader.of(model)


def test_parts_hold_every_row_once_within_the_budget() -> None:
    draws = random.Random(1)
    lengths = [draws.randint(1, 100) for _ in range(200)]
    parts = list(batches_by_length(lengths, 150))
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert all(len(part) * max(lengths[i] for i in part) <= 150 for part in parts)
    assert list(batches_by_length([500, 3], 100)) == [[0], [1]]


def test_rows_are_padded_if_attention_ignores_segments(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(module: nn.Module, *args: Any, segments: object = None, **settings: Any) -> tuple[Tensor, Any]:
        return whole(module, *args, **settings)

    kind = model.config._attn_implementation
    whole = ALL_ATTENTION_FUNCTIONS[kind]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kind, blind)
    assert Reader.of(model).backbone.longest == 0


def test_packed_attention_does_not_change_other_calls(model: PreTrainedModel) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    masked = model(input_ids=ids, attention_mask=mask).logits[0, 2:]
    alone = model(input_ids=ids[:1, 2:]).logits[0]
    assert torch.allclose(masked.log_softmax(-1), alone.log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_of_any_size_are_accepted(dtype: torch.dtype, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).eval()
    model.lm_head.weight.data *= 400  # logits of about 30, where one step of bfloat16 is 0.125
    assert Reader.of(model).backbone.longest > 0


def test_unsupported_output_head_is_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.config.logit_scale = 1.5
    with pytest.raises(UserError, match="computes its logits in an unsupported way"):
        Reader.of(model)


def test_kernels_get_each_segment_alone_and_no_positions(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 takes position ids for boundaries between rows. A segment has none."""
    seen: list[tuple[int, object]] = []

    def kernel(module: nn.Module, query: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Any]:
        seen.append((query.shape[2], settings.get("position_ids")))
        return whole(module, query, *args, **settings)

    kind = model.config._attn_implementation
    whole = packing.ALL_ATTENTION_FUNCTIONS[kind].args[0]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kind, partial(packing._attention, kernel))
    row = [[5, 6, 7], [8, 9], [4]]
    Backbone.unchecked(model).states([row, [[5, 6, 7, 8]]])
    assert seen == [(5, None), (4, None), (4, None)] * model.config.num_hidden_layers

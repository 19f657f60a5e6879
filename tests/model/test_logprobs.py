"""Log-probabilities of answers against whole logits, value and gradient, for every family and however rows are read."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_align import recipe
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.model import logprobs
from lora_align.model.logprobs import Reader, Shared, answer_logprobs, batches, parts
from lora_align.model.room import Room
from support import make_base

FAMILIES = ["llama", "qwen3", "mistral", "gemma", "gemma2"]


def rows(count: int, longest: int = 12, answers: int = 2) -> list[Shared]:
    draws = random.Random(0)

    def text(length: int) -> list[int]:
        return [draws.randrange(5, 900) for _ in range(length)]

    return [
        (text(draws.randint(1, longest)), [text(draws.randint(1, longest)) for _ in range(answers)])
        for _ in range(count)
    ]


def by_hand(model: PreTrainedModel, given: list[Shared]) -> Tensor:
    """One answer at a time, from logits of every position."""
    found = []
    for prompt, answers in given:
        for answer in answers:
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
            found.append(logits[places, torch.tensor(answer)].sum())
    return torch.stack(found)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = make_base(tmp_path_factory.mktemp(request.param), request.param)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found.requires_grad_(False)
    found.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    return found


def slope(model: PreTrainedModel, sums: Tensor) -> Tensor:
    """The gradient at one weight of a loss that weighs every answer differently."""
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = None
    (sums * torch.linspace(-1, 1, len(sums), dtype=sums.dtype)).sum().backward()
    return weight.grad.double().clone()


@pytest.mark.parametrize(("look", "shared"), [(0.0, {True}), (0.05, {True, False}), (1e9, {False})])
@pytest.mark.parametrize("at_once", [logprobs.LOGITS, 3000], ids=["all positions", "three positions"])
@pytest.mark.parametrize("overhead", [0.0, 10.0, math.inf])
def test_value_and_gradient(
    look: float,
    shared: set[bool],
    at_once: int,
    overhead: float,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS", at_once)
    reader = Reader.of(model)
    assert reader.longest_shared > 0
    reader, given = replace(reader, look=look, overhead=overhead), rows(6)
    assert {reader.shares(row) for row in given} == shared
    expected = by_hand(model, given)
    sums, hits = reader.sums(given)
    assert torch.allclose(sums.double(), expected, atol=1e-4)
    wanted = slope(model, expected)
    assert (slope(model, sums) - wanted).norm() < 1e-5 * wanted.norm()
    assert 0 <= hits.min() <= hits.max() <= 12


def test_answers_share_no_more_than_a_window_sees(tmp_path: Path) -> None:
    """Within a window each token sees all before it; beyond, a prompt is computed for each answer by itself."""
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path, "mistral"), dtype=torch.float32).eval()
    model.config.sliding_window = 24
    reader = replace(Reader.of(model), look=0.0)
    assert reader.longest_shared == 24
    given = rows(5, longest=20)
    assert {reader.shares(row) for row in given} == {True, False}
    with torch.no_grad():
        assert torch.allclose(reader.sums(given)[0].double(), by_hand(model, given), atol=1e-4)


def test_any_number_at_once_gives_the_same(model: PreTrainedModel) -> None:
    given = rows(9, answers=3)
    with torch.no_grad():
        expected = by_hand(model, given).float()
    for tokens in (1, 60, 10_000):
        assert torch.allclose(answer_logprobs(model, given, Room(tokens)), expected, atol=1e-4)


def test_weights_that_are_nan_are_named(llama: Path) -> None:
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


def test_parts_hold_every_row_once_and_keep_to_their_budget() -> None:
    draws = random.Random(1)
    lengths = [draws.randint(1, 100) for _ in range(200)]
    found = list(parts(lengths, 150))
    assert sorted(i for part in found for i in part) == list(range(200))
    assert all(len(part) * max(lengths[i] for i in part) <= 150 for part in found)
    assert list(parts([500, 3], 100)) == [[0], [1]]


def _cost(lengths: list[int], found: list[list[int]], overhead: float) -> float:
    return sum(overhead + len(batch) * max(lengths[i] for i in batch) for batch in found)


@pytest.mark.parametrize("overhead", [0.0, 7.0, 1000.0])
def test_batches_cost_least_of_all_divisions_by_length(overhead: float) -> None:
    draws = random.Random(2)
    for _ in range(20):
        lengths = [draws.randint(1, 60) for _ in range(8)]
        found = batches(lengths, overhead)
        assert sorted(i for batch in found for i in batch) == list(range(8))
        order = sorted(range(8), key=lambda i: -lengths[i])
        least = math.inf
        for cuts in itertools.product([False, True], repeat=7):  # behind each row but the last
            ends = [at + 1 for at, cut in enumerate(cuts) if cut] + [8]
            ways = [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
            least = min(least, _cost(lengths, ways, overhead))
        assert _cost(lengths, found, overhead) == least


def test_batches_of_a_divided_base_are_one() -> None:
    assert batches([3, 50, 1], math.inf) == [[0, 1, 2]]
    assert batches([], 5.0) == []


def test_a_pass_costs_more_tokens_where_it_dequantises(llama: Path) -> None:
    base = bases.find(recipe.Base(str(llama)))
    dequantised, stock = base.load(), bases._load(base.folder, base.recipe, torch.device("cpu"))
    more = logprobs.overhead(stock, "cpu") - logprobs.overhead(dequantised, "cpu")
    assert more == logprobs.DEQUANTISING["cpu"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_of_any_size_are_accepted(dtype: torch.dtype, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).eval()
    model.lm_head.weight.data *= 400  # logits of about 30, where one step of bfloat16 is 0.125
    assert Reader.of(model).longest_shared > 0


def test_another_head_is_refused_in_any_dtype(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.config.logit_scale = 1.5
    with pytest.raises(UserError, match="computes its logits in a way"):
        Reader.of(model)

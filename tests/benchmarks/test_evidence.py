"""Check the statistics of the evidence page, and MODPO's loss, against calculations by hand."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from lora_align import recipe
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.model import base as bases
from lora_align.model.logprobs import TOKENS, Reader, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.tokenise import TokenPair
from lora_align.train.dpo import DpoLoss

FOLDER = Path(__file__).parent
ASKED = [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7, 8, 9]]  # two of the first seed's prompts are the second's, too


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """Import the benchmarks, and restore the environment."""
    with mock.patch.dict(os.environ), mock.patch("sys.path", [str(FOLDER), *sys.path]):
        yield {name: importlib.import_module(name) for name in ("evidence_item", "fronts", "modpo")}


@pytest.fixture
def item(benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the input of an item, with few prompts."""
    monkeypatch.setattr(benchmarks["evidence_item"], "_prompts", lambda: ASKED)
    return benchmarks["evidence_item"]


def test_mean_pools_seeds_and_resamples_shared_prompts_together(item: ModuleType) -> None:
    apart = [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, None]]
    estimate = item.SeedEstimate.of(apart)
    assert estimate.value == pytest.approx(6 / 11)
    assert estimate.seeds == pytest.approx([0.5, 0.5, 2 / 3])
    assert estimate.low < estimate.value < estimate.high
    facts = [[1.0, 0.0, 1.0] * 4] * 3  # not as many as prompts: the same facts for all seeds
    alone = item.SeedEstimate.of([[1.0, 0.0, 1.0] * 4, [], []])
    assert item.SeedEstimate.of(facts).low == pytest.approx(alone.low, abs=0.02), (
        "three seeds tell no more than one of them"
    )


def test_paired_rise_is_found_though_means_overlap(item: ModuleType) -> None:
    grades: list[list[float | None]] = [[0.1, 0.5, 0.9, None], [0.2, 0.6, 0.9, 0.3], [0.1, 0.9, 0.4, 0.6]]
    before, after = ([{"grade": [value and value + more for value in of]} for of in grades] for more in (0.0, 0.02))
    rise = item.moved(after, before, "grade")
    assert rise.value == pytest.approx(0.02)
    assert (rise.higher, rise.lower) == (True, False)
    assert item.moved(before, after, "grade").lower
    means = [item.figure(of, "grade") for of in (after, before)]
    assert means[0].low < means[1].high


def test_rise_requires_every_seed(item: ModuleType) -> None:
    estimate = item.SeedEstimate.of([[1.0] * 4, [1.0] * 4, [-0.1] * 4])
    assert estimate.value > 0
    assert not estimate.higher
    assert estimate.answer.startswith("undecided")


def test_front_is_compared_over_its_own_range(benchmarks: dict[str, ModuleType]) -> None:
    front = np.array([[0.9, 0.6], [0.5, 0.2], [0.7, 0.4]])
    others = np.array([[0.3, 0.1], [0.4, 0.3], [0.8, 0.6]])
    assert benchmarks["fronts"].gaps(front, others) == pytest.approx([0.6 - 0.4, 0.9 - 0.8])
    assert benchmarks["fronts"].volume(front) == pytest.approx(0.5 * 0.2 + 0.7 * 0.2 + 0.9 * 0.4)


def test_modpo_equals_dpo_with_a_shifted_reference(benchmarks: dict[str, ModuleType]) -> None:
    modpo, beta = benchmarks["modpo"], 1.5
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    model = base.load()
    tokens = [base.chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
        "Tell me about the moon.", "The moon circles the earth.", "I do not care.", "It shines at night.")]  # fmt: skip
    rows = [TokenPair(tokens[0], tokens[1], tokens[2]), TokenPair(tokens[0], tokens[3], tokens[1])]
    draw = torch.Generator().manual_seed(0)
    layer = "model.layers.1.mlp.up_proj"
    shape = dict(model.named_modules())[layer]
    factors = Factors(
        torch.randn(shape.out_features, 2, generator=draw) / 9, torch.randn(2, shape.in_features, generator=draw) / 9
    )
    mixer = Mixer(model, {"other": LoraDelta.of({layer: factors})}, {})

    def read(weight: float) -> torch.Tensor:
        mixer.set({"other": weight})
        return answer_logprobs(model, [row.shared() for row in rows], MemoryBudget(TOKENS)).view(-1, 2).double()

    start, other, policy = read(0.0), read(1.0), read(-0.7)
    known = [
        TokenPair(row.prompt, row.chosen, row.rejected, tuple(of.tolist())) for row, of in zip(rows, start, strict=True)
    ]
    mixer.set({"other": 1.0})
    moved = modpo._moved(model, known)
    mixer.set({"other": -0.7})
    objective = DpoLoss(Reader.of(model), base.chat, beta / modpo.OWN)
    loss = objective.part(moved, objective.weights(moved)).loss
    gain, margin = (of[:, 0] - of[:, 1] - start[:, 0] + start[:, 1] for of in (policy, other))
    wanted = -logsigmoid((beta * gain - (1 - modpo.OWN) * beta * margin) / modpo.OWN).mean()
    assert float(loss) == pytest.approx(float(wanted), abs=1e-4)
    assert float(margin.abs().min()) > 0.01

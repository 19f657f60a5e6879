"""PEFT's own weighted sums compared with ours: its exact sum agrees, and its inexact ones are pinned.

If a test fails after an upgrade of PEFT, upstream may have fixed a sum: remove the test and its sentence in the README.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_align.adapters import peft_format
from lora_align.adapters.delta import total
from support import peft_adapter

WEIGHTS = {"a": 1.0, "b": -0.5}
Dense = dict[str, torch.Tensor]


def both(llama: Path, folder: Path, *kinds: dict[str, Any]) -> Dense:
    """Save two adapters and return their dense weighted sum."""
    made = zip(WEIGHTS, kinds, strict=True)
    dense = {name: peft_adapter(llama, folder / name, i, **kind) for i, (name, kind) in enumerate(made)}
    zero = torch.zeros(())
    return {
        module: sum((weight * dense[name].get(module, zero) for name, weight in WEIGHTS.items()), zero)
        for module in {module for one in dense.values() for module in one}
    }


def by_peft(llama: Path, folder: Path, combination: str) -> PeftModel:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder / "a", adapter_name="a")
    model.load_adapter(str(folder / "b"), "b")
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=combination)
    return model


def deltas(model: PeftModel) -> Dense:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("sum").detach()
        for name, module in model.named_modules()
        if "sum" in getattr(module, "lora_A", {})
    }


def ours(folder: Path) -> Dense:
    delta = total([peft_format.load(folder / name) * weight for name, weight in WEIGHTS.items()])
    return {name: factors.B @ factors.A for name, factors in delta.items()}


def off(actual: Dense, expected: Dense) -> float:
    """Return the relative distance."""
    assert set(actual) == set(expected)
    distance = sum(float((actual[name] - matrix).square().sum()) for name, matrix in expected.items())
    return math.sqrt(distance / sum(float(matrix.square().sum()) for matrix in expected.values()))


PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
OTHER = {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}


def test_peft_cat_of_plain_adapters_equals_our_sum(llama: Path, tmp_path: Path) -> None:
    expected = both(llama, tmp_path, PLAIN, OTHER)
    assert off(deltas(by_peft(llama, tmp_path, "cat")), expected) < 1e-6
    assert off(ours(tmp_path), expected) < 1e-6


def test_peft_linear_sum_has_cross_terms(llama: Path, tmp_path: Path) -> None:
    expected = both(llama, tmp_path, PLAIN, PLAIN)
    assert off(deltas(by_peft(llama, tmp_path, "linear")), expected) > 0.3
    assert off(ours(tmp_path), expected) < 1e-6


def test_peft_cat_of_rslora_is_too_large_by_sqrt_of_the_rank(llama: Path, tmp_path: Path) -> None:
    kind = {"r": 6, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True}
    expected = both(llama, tmp_path, kind, kind)
    actual = deltas(by_peft(llama, tmp_path, "cat"))
    assert off(actual, {name: math.sqrt(12) * matrix for name, matrix in expected.items()}) < 1e-6
    assert off(ours(tmp_path), expected) < 1e-6


def test_peft_linear_sum_with_rank_patterns_does_not_load(llama: Path, tmp_path: Path) -> None:
    kind = {**PLAIN, "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 7}}
    expected = both(llama, tmp_path, kind, kind)
    by_peft(llama, tmp_path, "linear").save_pretrained(str(tmp_path), selected_adapters=["sum"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "sum")
    assert off(ours(tmp_path), expected) < 1e-6

"""Compiled layers compute the same as eager layers, and one program serves all layers and lengths."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_align import recipe
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.compiled_layers import compiled_layers
from lora_align.model.logprobs import Reader, Shared
from lora_align.train import lora_trainer
from support import Cli

ROWS: list[list[Shared]] = [  # a batch each
    [([5, 6, 7], ([8, 9, 10, 11],)), ([7, 5], ([14, 15, 16],))],
    [([4, 9, 9, 6, 13], ([11, 8, 10, 6, 5, 7, 9],)), ([5] * 9, ([6],)), ([8, 7], ([5, 5],))],
]


@pytest.fixture
def base(llama: Path) -> Base:
    return bases.find(recipe.Base(str(llama)))


@pytest.fixture
def policy(base: Base) -> PeftModel:
    made = get_peft_model(base.load(), lora_trainer.adapter_config(recipe.Lora(rank=4), base)).train()
    lora_trainer.initialise(made, 0)
    with torch.no_grad():
        for name, parameter in lora_trainer.trainable(made):
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return made


def gradients(policy: PeftModel) -> dict[str, torch.Tensor]:
    reader = Reader.unchecked(policy.get_base_model()).padded()
    policy.zero_grad()
    for rows in ROWS:
        reader.sums(rows)[0].sum().backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad.clone() for name, parameter in lora_trainer.trainable(policy)}


def test_compiled_layers_give_the_gradients_of_eager_layers(policy: PeftModel) -> None:
    wanted = gradients(policy)
    before = counters["stats"]["unique_graphs"]
    with compiled_layers(policy):
        compiled = gradients(policy)
        again = gradients(policy)
    made = counters["stats"]["unique_graphs"] - before
    assert 0 < made <= 2, "compiled once for each layer or length"
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert (compiled[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
        assert torch.equal(compiled[name], again[name]), name
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) > 1
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_nothing_is_compiled_if_not_wanted(policy: PeftModel) -> None:
    before = counters["stats"]["unique_graphs"]
    with compiled_layers(policy, wanted=False):
        gradients(policy)
    assert counters["stats"]["unique_graphs"] == before


def test_compile_without_a_c_compiler_is_an_error(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))  # without programs compiled before
    words = ["dpo", "--pref", "brief", "--limit", "24", "--set", f'base.model="{llama}"', "--set", "dpo.batch_size=8"]
    done = cli(*words, "--set", "dpo.compile=true")
    assert done.code == 1
    assert "error: torch.compile failed on the base (InvalidCxxCompiler: No working C++ compiler found" in done.err
    assert done.err.endswith("set compile = false in the stage's table\n")
    assert "Traceback" not in done.err

"""A mixed base equals the dense sum of base and weighted updates, and a weight of 0 restores the base exactly."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_align import recipe
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.model.reward_model import Heads

IDS = torch.arange(5, 45).view(2, 20)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.clone()


def _update(seed: int, rank: int, layers: dict[str, tuple[int, int]]) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    return LoraDelta.of({name: Factors(draw(out, rank), draw(rank, inp)) for name, (out, inp) in layers.items()})


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return bases.find(recipe.Base(str(llama))).load()


UPDATES = {
    "a": _update(1, 3, {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}),
    "b": _update(2, 5, {"model.layers.1.mlp.down_proj": (64, 128), "model.layers.0.mlp.up_proj": (128, 64)}),
}


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.3, "b": -1.5}, {"b": 2.0}, {}])
def test_mixed_base_equals_the_dense_sum(weights: dict[str, float], model: PreTrainedModel, llama: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    layers, quantised = dict(dense.named_modules()), dict(model.named_modules())
    for name, module in quantised.items():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            layers[name].weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    for which, weight in weights.items():
        for name, factors in UPDATES[which].items():
            layers[name].weight.data += weight * (factors.B @ factors.A)
    Mixer(model, UPDATES, weights)
    assert (_logits(model) - _logits(dense)).abs().max() < 1e-4


def test_setting_weights_is_exactly_reversible(model: PreTrainedModel) -> None:
    plain = _logits(model)
    mixer = Mixer(model, UPDATES, {"a": 1.0, "b": 0.5})
    mixed = _logits(model)
    assert (mixed - plain).abs().max() > 1e-2
    for value in (0.0, 1e-3, 7.0, -1.0):
        mixer.set({"a": value, "b": value})
    mixer.set({})
    assert torch.equal(_logits(model), plain)
    mixer.set({"a": 1.0, "b": 0.5})
    assert torch.equal(_logits(model), mixed)
    mixer.remove()
    assert torch.equal(_logits(model), plain)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("model.layers.7.self_attn.q_proj", (64, 64), "the base's layer is missing"),
        ("model.layers.0.self_attn.q_proj", (32, 64), "is 32×64, the base's layer is 64×64"),
    ],
)
def test_adapter_of_another_base_is_refused(
    layer: str, shape: tuple[int, int], message: str, model: PreTrainedModel
) -> None:
    plain = _logits(model)
    with pytest.raises(UserError, match=message):
        Mixer(model, {"b": UPDATES["b"], "a": _update(0, 2, {layer: shape})}, {"a": 1.0, "b": 1.0})
    assert torch.equal(_logits(model), plain), "no branch stays"


def test_branches_compute_in_float32_under_autocast(llama: Path) -> None:
    """Branches give the same bits in training (under autocast) and in the reference pass (without)."""
    model = bases.find(recipe.Base(str(llama), dtype="bfloat16")).load()
    layer = model.model.layers[0].mlp.up_proj
    draw = torch.Generator().manual_seed(0)
    factors = Factors(
        *(torch.randn(shape, generator=draw) for shape in ((layer.out_features, 4), (4, layer.in_features)))
    )
    Mixer(model, {"start": LoraDelta.of({"model.layers.0.mlp.up_proj": factors})}, {"start": 1.0})
    inputs = torch.randn(3, layer.in_features, generator=draw, dtype=torch.float32).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = layer(inputs)
    with torch.no_grad():
        assert torch.equal(trained, layer(inputs))


def test_reward_heads_compute_in_float32_under_autocast() -> None:
    heads = Heads(16, {"one": 0.0}, {"one": 1.0})
    torch.nn.init.normal_(heads.weight, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = heads(inputs)
    with torch.no_grad():
        assert torch.equal(trained, heads(inputs))


def test_rows_of_one_batch_have_their_own_weights(model: PreTrainedModel) -> None:
    mixer = Mixer(model, UPDATES, {})
    rows = [{"a": 0.5, "b": -1.0}, {"b": 2.0}]
    alone = []
    for place, weights in enumerate(rows):
        mixer.set(weights)
        alone.append(_logits(model)[place])
    mixer.set_rows(rows)
    assert (_logits(model) - torch.stack(alone)).abs().max() < 1e-5
    mixer.set_rows([{"a": 1.0}])  # one row of weights is for every row
    one = _logits(model)
    mixer.set({"a": 1.0})
    assert torch.equal(_logits(model), one)
    with pytest.raises(KeyError, match="c"):
        mixer.set_rows([{"c": 1.0}])


def test_rows_keep_their_weights_in_layers_that_get_flat_inputs(model: PreTrainedModel) -> None:
    """Some layers of mixtures of experts get [rows · tokens, width]."""
    mixer = Mixer(model, UPDATES, {})
    layer = dict(model.named_modules())["model.layers.1.mlp.down_proj"]
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    mixer.set_rows([{"a": 0.5}, {"b": -1.0}])
    with torch.inference_mode():
        assert (layer(x.flatten(0, 1)) - layer(x).flatten(0, 1)).abs().max() < 1e-5

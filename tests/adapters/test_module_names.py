"""Layers that a configuration leaves out are not mistaken for missing tensors."""

import pytest

from lora_align.adapters import module_names

DEEP = 12
EVERY = list(range(DEEP))
ATTENTION = [0, 3, 4, 9]  # irregular, as in models found by architecture search
WHOLE = {
    "like any Llama": {"attn.q": EVERY, "attn.v": EVERY, "mlp.up": EVERY},
    "one kind of module": {"attn.q": EVERY},
    "attention here and there": {"attn.q": ATTENTION, "attn.v": ATTENTION, "mlp.up": EVERY},
    "only attention, every fourth layer": {"attn.q": EVERY[3::4], "attn.v": EVERY[3::4]},
    "the last layers share keys and values": {"attn.q": EVERY, "attn.v": EVERY[:7]},
    "the first layer dense, then experts": {
        "attn.q": EVERY,
        "mlp.down": EVERY[:1],
        "mlp.experts.0.down": EVERY[1:],
        "mlp.experts.1.down": EVERY[1:],
    },
}


def names(kinds: dict[str, list[int]], stack: str = "model.layers") -> list[str]:
    return [f"{stack}.{layer}.{kind}" for kind, layers in kinds.items() for layer in layers]


@pytest.mark.parametrize("kind", WHOLE)
def test_complete_adapters_have_nothing_missing(kind: str) -> None:
    assert module_names.missing_module(names(WHOLE[kind]), everywhere=True) == ""
    tower = names({"attn.qkv": EVERY[:5]}, "visual.blocks")
    assert module_names.missing_module([*names(WHOLE[kind]), *tower, "lm_head"], everywhere=True) == ""


@pytest.mark.parametrize("kind", ["like any Llama", "one kind of module"])
def test_missing_module_of_an_inner_layer_is_detected(kind: str) -> None:
    whole = names(WHOLE[kind])
    for gone in (name for name in whole if ".0." not in name and f".{DEEP - 1}." not in name):
        assert module_names.missing_module([name for name in whole if name != gone], everywhere=True), gone


def test_missing_module_of_a_block_is_detected_in_any_layer() -> None:
    whole = names(WHOLE["attention here and there"])
    for gone in (name for name in whole if "attn" in name):
        message = module_names.missing_module([name for name in whole if name != gone], everywhere=False)
        assert message == f"{gone.rpartition('.')[0]} has no {gone.rpartition('.')[2]}"


@pytest.mark.parametrize("gone", [(3, 9), (2, 5, 11), (4, 5)])
def test_irregular_gaps_are_detected_and_regular_ones_accepted(gone: tuple[int, ...]) -> None:
    deep = list(range(32))
    present = [layer for layer in deep if layer not in gone]
    assert (
        module_names.missing_module(names({"attn.q": present, "attn.v": present}), everywhere=True)
        == f"model.layers.{gone[0]} has no attn"
    )
    halved = names({"attn.q": deep, "attn.v": present})
    assert module_names.missing_module(halved, everywhere=True) == f"model.layers.{gone[0]}.attn has no v"
    linear = [layer for layer in deep if layer % 4 != 3]
    assert module_names.missing_module(names({"attn.q": deep, "linear_attn.in": linear}), everywhere=True) == ""


def test_missing_layer_is_accepted_unless_all_are_expected() -> None:
    some = names({"attn.q": [0, 1, 2, 4, 5], "attn.v": [0, 1, 2, 4, 5]})
    assert module_names.missing_module(some, everywhere=True) == "model.layers.3 has no attn"
    assert module_names.missing_module(some, everywhere=False) == ""
    assert module_names.last_layers([*some, "lm_head"]) == {
        ("model.layers", "attn", "q"): 5,
        ("model.layers", "attn", "v"): 5,
    }

"""Which absent layers are a model's own way, and which are tensors that somebody lost."""

import pytest

from lora_align.adapters import layers

DEEP = 12
EVERY = range(DEEP)
DENSE = {
    "like any Llama": {"attn.q": EVERY, "attn.v": EVERY, "mlp.up": EVERY},
    "attention every fourth layer": {"attn.q": range(3, DEEP, 4), "linear.in": set(EVERY) - set(range(3, DEEP, 4))},
    "first layers dense, then experts": {
        "mlp.up": range(2),
        "mlp.down": range(2),
        "experts.0.up": range(2, DEEP),
        "experts.1.up": range(2, DEEP),
    },
}


def names(kinds: dict[str, range | set[int]], stack: str = "model.layers") -> list[str]:
    return [f"{stack}.{layer}.{kind}" for kind, of in kinds.items() for layer in of]


@pytest.mark.parametrize("kind", DENSE)
def test_whole_adapters_have_no_gap(kind: str) -> None:
    assert layers.gap(names(DENSE[kind]), None) == ""
    tower = names({"attn.qkv": range(5)}, "visual.blocks")
    assert layers.gap([*names(DENSE[kind]), *tower, "lm_head"], None) == ""


@pytest.mark.parametrize("kind", DENSE)
def test_one_lost_module_is_noticed_wherever_it_was(kind: str) -> None:
    whole = names(DENSE[kind])
    last = [name for name in whole if f".{DEEP - 1}." in name]
    for lost in whole:
        if [lost] == last:
            continue  # what is left is a whole adapter of a base with a layer less
        assert layers.gap([name for name in whole if name != lost], None), lost


def test_layers_an_adapter_is_confined_to() -> None:
    some = names({"attn.q": {2, 5}, "attn.v": {2, 5}})
    assert layers.gap(some, [2, 5]) == ""
    assert layers.gap(some, [2, 5, 7]) == "model.layers.7 has no attn.q"
    assert layers.gap(some, [2]) == "model.layers.5 is not among layers_to_transform"
    assert layers.gap(names({"attn.q": {3}}), 3) == ""
    assert layers.depths([*some, "visual.blocks.0.x"]) == {"model.layers": 6, "visual.blocks": 1}

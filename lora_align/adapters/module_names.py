"""Module names parsed into layer and kind, to detect tensors that an adapter has lost."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

NUMBER = re.compile(r"\.(\d+)\.")


class Place(NamedTuple):
    """The parts of a module name such as `model.layers.3.self_attn.q_proj`."""

    stack: str  # model.layers
    layer: int  # 3
    block: str  # self_attn
    kind: str  # q_proj


def parse_name(module: str) -> Place | None:
    """Parse a module name; None if it has no layer number, like lm_head."""
    match = NUMBER.search(module)
    if not match:
        return None
    block, _, kind = module[match.end() :].rpartition(".")
    return Place(module[: match.start()], int(match[1]), block, kind)


def last_layers(modules: Iterable[str]) -> dict[tuple[str, str, str], int]:
    """Return the last layer of each kind of module."""
    last: dict[tuple[str, str, str], int] = {}
    for at in filter(None, map(parse_name, modules)):
        last[at.stack, at.block, at.kind] = max(at.layer, last.get((at.stack, at.block, at.kind), 0))
    return last


def missing_module(modules: Iterable[str], everywhere: bool) -> str:
    """Describe the first module, or block of a layer, that seems to be missing from an adapter; "" if none is.

    Some models have regular differences between layers: attention in every fourth, dense first layers, shared keys in
    the last. A single or irregular gap counts as missing. `everywhere` says that the configuration selects every layer.
    """
    blocks: dict[tuple[str, str], dict[int, frozenset[str]]] = {}
    for at in filter(None, map(parse_name, modules)):
        layers = blocks.setdefault((at.stack, at.block), {})
        layers[at.layer] = layers.get(at.layer, frozenset()) | {at.kind}
    for (stack, block), layers in blocks.items():
        usual, times = Counter(layers.values()).most_common(1)[0]
        incomplete = {layer for layer, kinds in layers.items() if kinds < usual}
        if times > 1 and (times == len(layers) - 1 or not _regular(incomplete, layers)):
            for layer in sorted(incomplete):
                return f"{'.'.join(filter(None, (stack, str(layer), block)))} has no {min(usual - layers[layer])}"
        gaps = set(range(min(layers), max(layers))) - set(layers)
        if everywhere and len(layers) > 2 and (len(gaps) == 1 or not _regular(gaps, {*layers, *gaps})):
            return f"{stack}.{min(gaps)} has no {block or min(usual)}"
    return ""


def _regular(missing: Collection[int], layers: Collection[int]) -> bool:
    """Return whether the missing layers are the first, the last, every n-th, or most of the layers."""
    ordered, gaps = sorted(layers), set(missing)
    if len(gaps) >= len(ordered) / 2 or not gaps:
        return True
    if gaps in (set(ordered[: len(gaps)]), set(ordered[-len(gaps) :])):
        return True
    first, second = sorted(gaps)[:2] if len(gaps) > 1 else (0, 0)
    return second > first and gaps == {n for n in ordered if n % (second - first) == first % (second - first)}

"""The layers an adapter covers, told from its modules' names, to notice what was lost from it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

NUMBER = re.compile(r"\.(\d+)\.")


class Place(NamedTuple):
    """`model.layers.3.self_attn.q_proj`, taken apart."""

    stack: str  # model.layers
    layer: int  # 3
    block: str  # self_attn
    kind: str  # q_proj


def place(module: str) -> Place | None:
    """Where a module sits; None where its name has no layer, as lm_head's."""
    match = NUMBER.search(module)
    if not match:
        return None
    block, _, kind = module[match.end() :].rpartition(".")
    return Place(module[: match.start()], int(match[1]), block, kind)


def deepest(modules: Iterable[str]) -> dict[tuple[str, str, str], int]:
    """The last layer of each kind of module."""
    found: dict[tuple[str, str, str], int] = {}
    for at in filter(None, map(place, modules)):
        found[at.stack, at.block, at.kind] = max(at.layer, found.get((at.stack, at.block, at.kind), 0))
    return found


def lost(modules: Iterable[str], everywhere: bool) -> str:
    """A module, or a layer's block, that was lost from an adapter; or nothing.

    Models differ from layer to layer by plan: every fourth has attention, the first are dense, the last share their
    keys. What is missing once, or here and there, was lost. `everywhere` says that no layer was left out on purpose.
    """
    blocks: dict[tuple[str, str], dict[int, frozenset[str]]] = {}
    for at in filter(None, map(place, modules)):
        layers = blocks.setdefault((at.stack, at.block), {})
        layers[at.layer] = layers.get(at.layer, frozenset()) | {at.kind}
    for (stack, block), layers in blocks.items():
        usual, times = Counter(layers.values()).most_common(1)[0]
        poorer = {layer for layer, kinds in layers.items() if kinds < usual}
        if times > 1 and (times == len(layers) - 1 or not _planned(poorer, layers)):
            for layer in sorted(poorer):
                return f"{'.'.join(filter(None, (stack, str(layer), block)))} has no {min(usual - layers[layer])}"
        inner = set(range(min(layers), max(layers))) - set(layers)
        if everywhere and len(layers) > 2 and (len(inner) == 1 or not _planned(inner, {*layers, *inner})):
            return f"{stack}.{min(inner)} has no {block or min(usual)}"
    return ""


def _planned(missing: Collection[int], layers: Collection[int]) -> bool:
    """Whether these are the first, the last, every so-manieth or most of the layers."""
    ordered, chosen = sorted(layers), set(missing)
    if len(chosen) >= len(ordered) / 2 or not chosen:
        return True
    if chosen in (set(ordered[: len(chosen)]), set(ordered[-len(chosen) :])):
        return True
    first, second = sorted(chosen)[:2] if len(chosen) > 1 else (0, 0)
    return second > first and chosen == {n for n in ordered if n % (second - first) == first % (second - first)}

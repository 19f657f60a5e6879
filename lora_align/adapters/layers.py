"""The layers an adapter covers, told from its modules' names, to notice what was lost from it."""

import re
from collections import Counter
from collections.abc import Iterable
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
    """A single module, or a single layer's block, that all the others have and one lacks; or nothing.

    Models differ from layer to layer: every fourth has attention, the first is dense, the last share their keys. What
    is missing once is therefore told from what is missing often. `everywhere` says that no layer was left out by plan.
    """
    blocks: dict[tuple[str, str], dict[int, frozenset[str]]] = {}
    for at in filter(None, map(place, modules)):
        layers = blocks.setdefault((at.stack, at.block), {})
        layers[at.layer] = layers.get(at.layer, frozenset()) | {at.kind}
    for (stack, block), layers in blocks.items():
        usual, times = Counter(layers.values()).most_common(1)[0]
        for layer, kinds in layers.items():
            if kinds < usual and times == len(layers) - 1 > 1:
                return f"{'.'.join(filter(None, (stack, str(layer), block)))} has no {min(usual - kinds)}"
        inner = set(range(min(layers), max(layers))) - set(layers)
        if everywhere and len(inner) == 1 and len(layers) > 2:
            return f"{stack}.{inner.pop()} has no {block or min(usual)}"
    return ""

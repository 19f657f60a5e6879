"""Whether adapters stand on one base: by what their manifests say, else by the base's name and the shapes."""

from collections.abc import Sequence

from lora_align.adapters import layers
from lora_align.adapters.peft_format import Adapter
from lora_align.console import inert
from lora_align.errors import UserError


def refuse_strangers(adapters: Sequence[Adapter], *, same_base: bool) -> None:
    """An error where shapes or layers differ, and, unless told that the base is the same, where its names do."""
    first = adapters[0]
    shapes = {name: (shape, first) for name, shape in first.shapes.items()}
    depths = {stack: (depth, first) for stack, depth in layers.depths(first.shapes).items()}
    for adapter in adapters[1:]:
        for name, shape in adapter.shapes.items():
            known, owner = shapes.setdefault(name, (shape, adapter))
            if known != shape:
                _refuse(adapter, owner, f"{inert(name)} is {_by(shape)} in one and {_by(known)} in the other")
        for stack, depth in layers.depths(adapter.shapes).items():
            known_depth, owner = depths.setdefault(stack, (depth, adapter))
            confined = [a for a in (adapter, owner) if a.config.get("layers_to_transform") is not None]
            if known_depth != depth and not confined:
                _refuse(adapter, owner, f"one has {depth} layers in {inert(stack)}, the other {known_depth}")
        if adapter.base != first.base and not same_base:
            raise UserError(
                f"{adapter.folder} names the base {inert(adapter.base)!r}, {first.folder} names "
                f"{inert(first.base)!r}; if these are one and the same, say --same-base"
            )


def _refuse(one: Adapter, other: Adapter, why: str) -> None:
    raise UserError(f"{one.folder} and {other.folder} stand on different bases: {why}; such adapters do not add")


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"

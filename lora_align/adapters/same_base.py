"""Check that adapters belong to one base: layer shapes and counts, and the base's name and revision."""

import itertools
from collections.abc import Sequence

from lora_align.adapters import module_names, peft_config
from lora_align.adapters.peft_format import Adapter
from lora_align.errors import UserError

Kind = tuple[str, str, str]


def check_same_base(adapters: Sequence[Adapter], *, same_base: bool) -> None:
    """Refuse adapters whose shapes or depths differ and, unless `same_base`, those whose bases may differ."""
    shapes: dict[str, tuple[tuple[int, int], Adapter]] = {}
    depths: dict[Kind, tuple[int, Adapter]] = {}
    for adapter in adapters:
        for name, shape in adapter.shapes.items():
            known, owner = shapes.setdefault(name, (shape, adapter))
            if known != shape:
                _refuse(adapter, owner, f"{name} is {_size(shape)} in the first and {_size(known)} in the second")
        if peft_config.covers_every_layer(adapter.config):
            for kind, last in module_names.last_layers(adapter.shapes).items():
                known_last, owner = depths.setdefault(kind, (last, adapter))
                if known_last != last:
                    _refuse(
                        adapter,
                        owner,
                        f"the last {kind[2]} is in layer {last} in the first and in layer {known_last} in the second",
                    )
    if not same_base:
        stacks = [{kind[0] for kind in module_names.last_layers(adapter.shapes)} for adapter in adapters]
        for (other, below), (one, above) in itertools.combinations(zip(adapters, stacks, strict=True), 2):
            _refuse_unclear(one, other, [above, below])


def _refuse_unclear(one: Adapter, other: Adapter, stacks: Sequence[set[str]]) -> None:
    """Refuse two adapters that name no base, or that name different bases, revisions or module trees."""
    revisions = [str(adapter.config.get("revision") or "") for adapter in (one, other)]
    why = ""
    if one.base != other.base:
        why = f"names the base {one.base!r}, {other.folder} names {other.base!r}"
    elif not one.base:
        why = f"does not name its base, nor does {other.folder}"
    elif all(revisions) and revisions[0] != revisions[1]:
        why = f"needs the base's revision {revisions[0]!r}, {other.folder} needs {revisions[1]!r}"
    elif all(stacks) and not stacks[0] & stacks[1]:
        why = f"adapts {min(stacks[0])}, {other.folder} adapts {min(stacks[1])}"
    if why:
        raise UserError(f"{one.folder} {why}; if their bases are the same, add --same-base")


def _refuse(one: Adapter, other: Adapter, why: str) -> None:
    raise UserError(f"{one.folder} and {other.folder} have different bases and cannot be added: {why}")


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"

"""The layers an adapter covers, told from its modules' names, to notice what is missing from it."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

NUMBER = re.compile(r"\.(\d+)\.")
Stacks = Mapping[str, Mapping[str, set[int]]]  # `model.layers` → `self_attn.q_proj` → the layers that have one


def covered(modules: Iterable[str]) -> Stacks:
    """Which layers of which stack have which kind of module."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in modules:
        match = NUMBER.search(name)
        if match:
            kinds = found.setdefault(name[: match.start()], {})
            kinds.setdefault(name[match.end() :], set()).add(int(match[1]))
    return found


def depths(modules: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has at least."""
    return {stack: max(map(max, kinds.values())) + 1 for stack, kinds in covered(modules).items()}


def gap(modules: Iterable[str], only: int | list[int] | None) -> str:
    """What an adapter lacks, or nothing. `only` are the layers its configuration confines it to."""
    for stack, kinds in covered(modules).items():
        deepest = max(map(max, kinds.values()))
        wanted = sorted({only} if isinstance(only, int) else set(only)) if only is not None else range(deepest + 1)
        alike = Counter(map(frozenset, kinds.values()))
        empty = set(wanted).difference(*kinds.values())
        if empty:
            return f"{stack}.{min(empty)} has no {next(iter(kinds))}"
        for kind, layers in kinds.items():
            if layers - set(wanted):
                return f"{stack}.{min(layers - set(wanted))} is not among layers_to_transform"
            has = [layer in layers for layer in wanted]
            legitimate = _repeats(has) or (_unbroken(has) and alike[frozenset(layers)] > 1)
            if not all(has) and not legitimate:
                return f"{stack}.{wanted[has.index(False)]} has no {kind}"
    return ""


def _repeats(has: Sequence[bool]) -> bool:
    """As in models every fourth layer of which has attention."""
    periods = range(1, len(has) // 2 + 1)
    return any(all(a == b for a, b in zip(has, has[period:], strict=False)) for period in periods)


def _unbroken(has: Sequence[bool]) -> bool:
    """As in models whose first layers are dense and whose others have experts."""
    return "".join("x" if here else " " for here in has).strip().count(" ") == 0

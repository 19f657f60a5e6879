"""Ways to merge, by name, and the words of a command line that choose among them. Nothing here needs torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_align.errors import UserError, nearest


@dataclass(frozen=True)
class Method:
    """A way to merge: its function in `merge`, where it comes from, its options, and what has to be known about it."""

    function: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)  # with their defaults
    dense: bool = False  # its result has no low rank by itself
    of_policies: bool = False  # it weighs policies: of a preference the adapter towards it, not the difference
    rank: Callable[[Iterable[int]], int] | None = None  # to cut to where none is asked for, from those of its parts


METHODS: dict[str, Method] = {
    "exact": Method("exact", "https://arxiv.org/abs/2504.20106"),
    "svd": Method("exact", "https://doi.org/10.1007/BF02288367", rank=max),
    "soup": Method("exact", "https://arxiv.org/abs/2306.04488", of_policies=True),
    "tsv": Method("tsv", "https://arxiv.org/abs/2412.00081"),
    "ties": Method("ties", "https://arxiv.org/abs/2306.01708", {"density": 0.2}, dense=True, rank=sum),
    "dare": Method("dare", "https://arxiv.org/abs/2311.03099", {"drop": 0.9, "seed": 0}, dense=True, rank=sum),
}
# Ranks a server takes. llama.cpp takes any, but scales each tensor by its own rank: they have to be alike.
FITS: dict[str, tuple[int, ...]] = {"vllm": (1, 8, 16, 32, 64, 128, 256, 320, 512), "llama.cpp": ()}
DTYPES = ("float32", "float16", "bfloat16")


def parsed(method: str, given: Iterable[str]) -> dict[str, Any]:
    """`["density=0.3"]` as a method's options, each of its default's type."""
    if method not in METHODS:
        raise UserError(f"no method {method!r}{nearest(method, list(METHODS))} (there are: {', '.join(METHODS)})")
    known, found = METHODS[method].options, {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            has = f"its options: {', '.join(known)}" if known else "it has none"
            raise UserError(f"--option {text}: {method} has no option {name!r} ({has})")
        try:
            found[name] = type(known[name])(value)
        except ValueError:
            raise UserError(f"--option {text}: {name} takes a number, as in {name}={known[name]}") from None
    return found


def check_weights(method: str, weights: Mapping[str, float]) -> None:
    """Refuse weights that a method cannot mean."""
    if METHODS[method].of_policies and not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise UserError(f"--method {method}: the weights of policies add up to 1, these to {sum(weights.values()):g}")


@dataclass(frozen=True)
class How:
    """The way from vectors to one adapter."""

    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    keep: float | None = None  # the smallest rank that keeps this share of the energy
    fit: str | None = None
    dtype: str | None = None
    with_start: bool = True
    same_base: bool = False

    @classmethod
    def said(
        cls,
        method: str,
        options: Sequence[str],
        rank: str | None,
        fit: str | None,
        dtype: str | None,
        *,
        with_start: bool = True,
        same_base: bool = False,
    ) -> "How":
        """The words of a command line, found to mean something."""
        if fit is not None and fit not in FITS:
            raise UserError(f"--fit {fit!r}: there is {', '.join(FITS)}")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
        number, keep = _asked_rank(rank) if rank is not None else (None, None)
        return cls(method, parsed(method, options), number, keep, fit, dtype, with_start, same_base)


EXACT = How()


def _asked_rank(text: str) -> tuple[int | None, float | None]:
    """`16` as a rank, `auto:0.99` as a share of the energy."""
    word, _, share = text.partition(":")
    try:
        number, keep = (None, float(share)) if word == "auto" else (int(text), None)
    except ValueError:
        number = keep = None
    if (number is not None and number >= 1) or (keep is not None and 0 < keep <= 1):
        return number, keep
    raise UserError(f"--rank {text!r}: a whole number from 1, or auto:0.99 for the smallest that keeps 99 % energy")

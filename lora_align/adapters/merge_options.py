"""Options of `merge` and `inspect`, parsed and checked: method, rank, inference server, dtype.

Does not import torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_align.adapters.merge_methods import METHODS
from lora_align.errors import UserError, nearest

# Ranks that a server accepts. llama.cpp accepts any rank, but scales each tensor by that tensor's rank, so all ranks
# must be equal.
SERVER_RANKS: dict[str, tuple[int, ...]] = {"vllm": (1, 8, 16, 32, 64, 128, 256, 320, 512), "llama.cpp": ()}
DTYPES = ("float32", "float16", "bfloat16")


def parse_options(method: str, texts: Iterable[str]) -> dict[str, Any]:
    """Parse options such as `density=0.3` into a method's options, with the types of the defaults."""
    if method not in METHODS:
        raise UserError(f"no method {method!r}{nearest(method, list(METHODS))} (known: {', '.join(METHODS)})")
    known, options = METHODS[method].options, {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            hint = f"known: {', '.join(known)}" if known else "it has no options"
            raise UserError(f"--option {text}: {method} has no option {name!r} ({hint})")
        try:
            options[name] = type(known[name])(value)
        except ValueError:
            raise UserError(f"--option {text}: {name} must be a number, as in {name}={known[name]}") from None
    return options


def check_weights(method: str, weights: Mapping[str, float]) -> None:
    """Refuse weights that do not sum to 1 for a method that averages policies."""
    if METHODS[method].of_policies and not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise UserError(f"--method {method}: weights must sum to 1; these sum to {sum(weights.values()):g}")


def server_rank(server: str, rank: int) -> int:
    """Return the smallest rank that a server accepts and that is at least `rank`."""
    if not SERVER_RANKS[server]:
        return rank
    accepted = [known for known in SERVER_RANKS[server] if known >= rank]
    if not accepted:
        raise UserError(
            f"--fit {server}: {server} accepts ranks up to {max(SERVER_RANKS[server])}, but this adapter has rank "
            f"{rank}; choose a smaller one with --rank"
        )
    return accepted[0]


@dataclass(frozen=True)
class MergeOptions:
    """The options of a merge: method, rank, server and dtype."""

    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    keep: float | None = None  # truncate to the smallest rank that keeps this share of the energy
    fit: str | None = None
    dtype: str | None = None
    with_start: bool = True
    same_base: bool = False

    def __post_init__(self) -> None:
        if self.fit is not None and self.fit not in SERVER_RANKS:
            raise UserError(f"fit {self.fit!r}: expected one of {', '.join(SERVER_RANKS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.rank is not None and self.keep is not None:
            raise UserError("rank and keep: give only one of them")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank {self.rank}: expected a whole number from 1")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep {self.keep:g}: expected a share of the energy above 0, up to 1")

    @classmethod
    def parse(
        cls,
        method: str,
        options: Sequence[str],
        rank: str | None,
        fit: str | None,
        dtype: str | None,
        *,
        with_start: bool = True,
        same_base: bool = False,
    ) -> "MergeOptions":
        """Parse and check command-line options."""
        number, keep = _parse_rank(rank) if rank is not None else (None, None)
        return cls(method, parse_options(method, options), number, keep, fit, dtype, with_start, same_base)


EXACT = MergeOptions()


def _parse_rank(text: str) -> tuple[int | None, float | None]:
    """Parse `16` as a rank and `auto:0.99` as a share of the energy."""
    word, _, share = text.partition(":")
    try:
        number, keep = (None, float(share)) if word == "auto" else (int(text), None)
    except ValueError:
        number = keep = None
    if (number is not None and number >= 1) or (keep is not None and 0 < keep <= 1):
        return number, keep
    raise UserError(
        f"--rank {text!r}: expected a whole number from 1, or auto:0.99 for the smallest rank with 99 % of the energy"
    )

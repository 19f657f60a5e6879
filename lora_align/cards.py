"""Graphics cards that can be planned for by name."""

from lora_align.errors import UserError

CARDS = {  # memory in GB, and 10¹² operations a second that its makers give for bfloat16 matrices without sparsity
    "rtx-3090": (24, 71),
    "rtx-4090": (24, 165),
    "rtx-5090": (32, 209),
    "a100": (80, 312),
    "h100": (80, 989),
}


def known(name: str) -> tuple[int, int]:
    """Return a card's memory and rate, or refuse a name that is not listed."""
    if name not in CARDS:
        raise UserError(f"--card {name!r}: one of {', '.join(CARDS)}")
    return CARDS[name]

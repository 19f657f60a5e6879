"""The memory and speed of the GPUs that a plan knows by name."""

import re

from lora_align.errors import UserError, nearest

# Memory in GB, and the vendor's TFLOP/s for 16-bit matrices (bfloat16 if the card supports it), without sparsity, with
# float32 accumulation. GeForce cards accumulate in float32 at half the rate of float16.
CARDS = {
    "rtx-2080-ti": (11, 54),
    "rtx-3060": (12, 25),
    "rtx-3060-ti": (8, 32),
    "rtx-3070": (8, 41),
    "rtx-3080": (10, 60),
    "rtx-3080-ti": (12, 68),
    "rtx-3090": (24, 71),
    "rtx-3090-ti": (24, 80),
    "rtx-4060": (8, 30),
    "rtx-4060-ti": (16, 44),
    "rtx-4070": (12, 58),
    "rtx-4070-super": (12, 71),
    "rtx-4070-ti": (12, 80),
    "rtx-4070-ti-super": (16, 88),
    "rtx-4080": (16, 97),
    "rtx-4080-super": (16, 104),
    "rtx-4090": (24, 165),
    "rtx-5060-ti": (16, 47),
    "rtx-5070": (12, 62),
    "rtx-5070-ti": (16, 88),
    "rtx-5080": (16, 113),
    "rtx-5090": (32, 209),
    "rtx-a4000": (16, 77),
    "rtx-a5000": (24, 111),
    "a10": (24, 125),
    "l4": (24, 121),
    "t4": (16, 65),
    "v100": (32, 125),
    "a100": (80, 312),
    "h100": (80, 989),
}
NO_BFLOAT16 = ("rtx-2080-ti", "t4", "v100")


def card_name(card: str) -> str:
    """Return the table's name of a card: "4090" and "NVIDIA GeForce RTX 4090" both give "rtx-4090"."""
    short = re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", card.lower())
    names = [name for name in CARDS if name.removeprefix("rtx-").replace("-", "") == short]
    if not names:
        raise UserError(f"--card {card!r}: unknown card{nearest(card, list(CARDS))} (known: {', '.join(CARDS)})")
    return names[0]

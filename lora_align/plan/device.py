"""What is planned for: this machine, or a card that is named."""

import math
import os
import re
import resource
import time
from dataclasses import dataclass

import torch

from lora_align.errors import UserError, nearest
from lora_align.model import base as bases
from lora_align.model.base import compute_dtype
from lora_align.recipe import Recipe

# Memory in GB, and 10¹² operations a second that its makers give for matrices in 16 bit (bfloat16 where a card has it)
# without sparsity, summed in float32. Cards for games sum in float32 at half the rate they sum in float16.
CARDS = {
    "rtx-3060": (12, 25),
    "rtx-3070": (8, 41),
    "rtx-3080": (10, 60),
    "rtx-3090": (24, 71),
    "rtx-4060": (8, 30),
    "rtx-4060-ti": (16, 44),
    "rtx-4070": (12, 58),
    "rtx-4070-ti": (12, 80),
    "rtx-4070-ti-super": (16, 88),
    "rtx-4080": (16, 97),
    "rtx-4090": (24, 165),
    "rtx-5060-ti": (16, 47),
    "rtx-5070": (12, 62),
    "rtx-5070-ti": (16, 88),
    "rtx-5080": (16, 113),
    "rtx-5090": (32, 209),
    "rtx-a4000": (16, 77),
    "rtx-a5000": (24, 111),
    "l4": (24, 121),
    "t4": (16, 65),
    "v100": (32, 125),
    "a100": (80, 312),
    "h100": (80, 989),
}
NO_BFLOAT16 = ("t4", "v100")
DRIVER = 0.6e9  # bytes of a card that CUDA keeps to itself; not measured


@dataclass(frozen=True)
class Device:
    """What is planned for."""

    name: str
    memory: float
    rate: float  # operations a second
    dtype: torch.dtype
    reserved: float
    count: int = 1  # of such devices, that train together


def device_of(recipe: Recipe, card: str = "", vram: float | None = None, count: int = 1) -> Device:
    """The card that is named, or what this machine trains on; so many of them."""
    if card or vram:
        card = _known(card or "rtx-4090")
        memory, rate = CARDS[card]
        half = torch.float16 if card in NO_BFLOAT16 else torch.bfloat16
        dtype = half if recipe.base.dtype == "auto" else getattr(torch, recipe.base.dtype)
        return Device(card, 1e9 * (vram or memory), 1e12 * rate, dtype, DRIVER, count)
    dtype, where = compute_dtype(recipe.base), bases.device()
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        return Device(properties.name, properties.total_memory, _rate(where, dtype), dtype, DRIVER, count)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # by the libraries
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("this CPU", memory, _rate(where, dtype), dtype, held, count)


def _known(card: str) -> str:
    """Return the card that a name means: 4090, RTX 4090 and `NVIDIA GeForce RTX 4090` are all rtx-4090."""
    said = re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", card.lower())
    found = [name for name in CARDS if name.removeprefix("rtx-").replace("-", "") == said]
    if not found:
        raise UserError(
            f"--card {card!r}: no such card is known{nearest(card, list(CARDS))} (known: {', '.join(CARDS)})"
        )
    return found[0]


def _rate(where: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, measured."""
    side = 8192 if where.type == "cuda" else 1024
    one = torch.randn(side, side, device=where).to(dtype)
    seconds = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (one @ one)[0, 0].item()  # waits until it is there
        seconds = min(seconds, time.perf_counter() - began)
    return 2 * side**3 / seconds

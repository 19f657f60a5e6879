"""The device of a plan: this machine, or a GPU given by name."""

import math
import time
from dataclasses import dataclass

import psutil
import torch

from lora_align.model import base as bases
from lora_align.model.base import compute_dtype
from lora_align.plan import cards
from lora_align.recipe import Recipe

CPU_SHARE = 0.6  # about that of SmolLM2-135M on two cores
GPU_SHARE = 0.5  # an assumption, not measured
DRIVER = 0.6e9  # bytes of a GPU that CUDA reserves; an assumption, not measured


@dataclass(frozen=True)
class Device:
    """A device and its memory, matrix rate and dtype."""

    name: str
    memory: float
    rate: float  # operations per second
    dtype: torch.dtype
    reserved: float
    count: int = 1  # devices that train together
    cpu: bool = False

    @property
    def share(self) -> float:
        """Return the assumed share of the matrix rate that training reaches."""
        return CPU_SHARE if self.cpu else GPU_SHARE


def device_of(recipe: Recipe, card: str = "", vram: float | None = None, count: int = 1) -> Device:
    """Return the named card, or the device that this machine trains on. `vram` (GB) overrides a card's memory."""
    if card or vram:
        card = cards.card_name(card or "rtx-4090")
        memory, rate = cards.CARDS[card]
        half = torch.float16 if card in cards.NO_BFLOAT16 else torch.bfloat16
        dtype = half if recipe.base.dtype == "auto" else getattr(torch, recipe.base.dtype)
        named = f"a card as fast as {card}" if vram else card
        return Device(named, 1e9 * (vram or memory), 1e12 * rate, dtype, DRIVER, count)
    dtype, where = compute_dtype(recipe.base), bases.device(recipe.base)
    free, total = bases.device_memory(where)
    if where.type != "cpu":  # `free` excludes memory that the driver and this process already use
        return Device(bases.device_name(where), free, matrix_rate(where, dtype), dtype, 0.0, count)
    used = psutil.Process().memory_info().rss  # memory of the loaded libraries
    return Device("this CPU", total, matrix_rate(where, dtype), dtype, used, count, cpu=True)


def matrix_rate(where: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a matrix product. Return the best of five."""
    side = 1024 if where.type == "cpu" else 8192
    one = torch.randn(side, side, device=where).to(dtype)
    seconds = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (one @ one)[0, 0].item()  # `item` waits until the device has finished
        seconds = min(seconds, time.perf_counter() - began)
    return 2 * side**3 / seconds

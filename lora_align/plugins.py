"""Extension points. This package and others register functions by entry points in groups named `lora_align.…`."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any


def names(group: str) -> set[str]:
    """Return the names that are registered in a group, and import nothing."""
    return entry_points(group=f"lora_align.{group}").names


@cache
def load(group: str) -> dict[str, Callable[..., Any]]:
    """Return what is registered in a group, by name; importing it may take time."""
    return {point.name: point.load() for point in entry_points(group=f"lora_align.{group}")}

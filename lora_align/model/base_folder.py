"""The folder of a base on this disk: a local folder, or that of a registered base. Does not import torch."""

from collections.abc import Callable
from pathlib import Path

from lora_align.plugins import Registry

BASES: Registry[Callable[[], Path]] = Registry("bases")


def local_folder(model: str) -> Path | None:
    """Return the folder of a model: a local folder or that of a registered base. Return None for other names."""
    path = Path(model).expanduser()
    if path.is_dir() and model not in BASES:
        return path
    registered = BASES.get(model)
    return registered() if registered else None


def is_hub_id(model: str) -> bool:
    """Return whether base.model is the form OWNER/NAME of a model on the hub, and not a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))

"""lora-align: preferences as LoRA adapters that can be added and subtracted."""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_align.errors import UserError
    from lora_align.project import Chat, Project
    from lora_align.vector import Vector, load

__all__ = ["Chat", "Project", "UserError", "Vector", "load"]

__version__ = "0.1.0"

# Libraries read these settings when they are imported, so they are set before any import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "OMP_WAIT_POLICY" not in os.environ:
    # Threads of GNU OpenMP spin while they wait. By default they spin so long that, beside another busy program, they
    # take CPU time from the thread they wait for.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()  # about an optional kernel that is not used
)
_PUBLIC = {"Chat": "project", "Project": "project", "UserError": "errors", "Vector": "vector", "load": "vector"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lora_align` takes no time."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)

"""The demo world: a small language, its data and oracle, a base that speaks it, and the demo."""

from pathlib import Path

BASE = Path(__file__).parent / "base"


def base_folder() -> Path:
    """Return the folder of the demo base. Registered as an entry point."""
    return BASE

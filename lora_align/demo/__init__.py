"""The demo world: a small artificial language, a base model trained on it, and the demo command."""

from pathlib import Path

BASE = Path(__file__).parent / "base"


def base_folder() -> Path:
    """Return the folder of the demo base. Registered as an entry point."""
    return BASE

"""The result of an export."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exported:
    """Published files, how to use them, and what was measured."""

    files: Mapping[Path, int]  # bytes
    use: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        files = {str(file): size for file, size in self.files.items()}
        return {"files": files, "use": self.use, "figures": dict(self.figures)}

    def summary(self) -> str:
        """Return each file with its size, the figures, and the commands that use the files."""
        lines = [f"{file}  {size / 1e6:,.1f} MB" for file, size in self.files.items()]
        figures = [f"{name}: {value:.3g}" for name, value in self.figures.items()]
        return "\n".join([*lines, *figures, "", self.use])

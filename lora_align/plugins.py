"""Registries that other packages extend: data sources and forms, rankers, merge methods, judges, bases.

A registry holds this package's rows, and finds the rows of other packages by entry points.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_align.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Rows by name: those in `built_in`, and the entry points of the group `lora_align.GROUP`.

    Entry points are looked up when a name is not built in, or when all names are listed. A row of another package is
    imported at its first use. No entry point replaces a built-in row.
    """

    def __init__(self, group: str, kind: Any = Callable, built_in: Mapping[str, T] | None = None) -> None:
        self.group, self.kind, self.built_in = f"lora_align.{group}", kind, dict(built_in or {})
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(self._entry_points[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._entry_points  # the inherited method would import the row

    def __iter__(self) -> Iterator[str]:
        return iter({**self.built_in, **self._entry_points})

    def __len__(self) -> int:
        return len({**self.built_in, **self._entry_points})

    def registered(self) -> list[T]:
        """Return the rows of other packages."""
        return [self[name] for name in self if name not in self.built_in]

    def code(self) -> list[list[str]]:
        """Return what identifies the code of other packages' rows: each package's version and each module's hash."""
        plugins = [self._entry_points[name] for name in sorted(self) if name not in self.built_in]
        return [
            [plugin.name, plugin.value, plugin.dist.version if plugin.dist else "", _hash(plugin)] for plugin in plugins
        ]

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def _load(self, entry_point: EntryPoint) -> T:
        where = f"entry point {entry_point.name} = {entry_point.value} of {self.group}"
        remedy = f"update or uninstall {entry_point.dist.name if entry_point.dist else 'its package'}"
        try:
            row: Any = entry_point.load()
        except (ImportError, AttributeError) as fault:
            raise UserError(f"{where}: {fault}; {remedy}") from fault
        if not isinstance(row, self.kind):
            raise UserError(f"{where}: not a {self.kind.__name__}; {remedy}")
        return row  # type: ignore[no-any-return]


def _hash(entry_point: EntryPoint) -> str:
    spec = find_spec(entry_point.module)
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest() if spec and spec.origin else ""

"""Define the fixture of a server on the demo base, with trained vectors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_support import Served, serving


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Served]:
    with serving(trained, "--weights", "helpful=1") as served:
        yield served

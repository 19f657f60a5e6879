"""Rows that must outlive a crash: each batch becomes a Parquet file of its own, whole or not there at all."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_align import runs
from lora_align.errors import UserError

KEY = "key"  # the column that says which piece of work a row is the answer to
UNFINISHED = ".unfinished"


class Shards:
    """A folder of Parquet files, numbered as they were written. Its rows' keys say what need not be done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("part-*.parquet"))

    def keys(self) -> set[str]:
        """What has been done."""
        from pyarrow.parquet import read_table

        return {key for file in self.files for key in read_table(file, columns=[KEY])[KEY].to_pylist()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything, in the order it was written."""
        from pyarrow.parquet import read_table

        for file in self.files:
            yield from read_table(file).to_pylist()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch: a file with another name, brought to the disk, then renamed in one step."""
        import pyarrow
        from pyarrow.parquet import write_table

        number = int(self.files[-1].stem.removeprefix("part-")) + 1 if self.files else 0
        file = self.folder / f"part-{number:06d}.parquet"
        unfinished = file.with_suffix(UNFINISHED)
        with unfinished.open("wb") as stream:
            write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(file)
        runs.sync(self.folder, contents=False)
        self.files.append(file)


@contextmanager
def opened(folder: Path) -> Iterator[Shards]:
    """The shards in a folder, for one process at a time; what a killed one left unfinished is cleared away."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is being written by another process") from None
    try:
        for left in folder.glob(f"*{UNFINISHED}"):
            left.unlink()
        yield Shards(folder)
    finally:
        lock.release()

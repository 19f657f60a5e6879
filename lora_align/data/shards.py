"""Rows that must outlive a crash: each batch becomes a Parquet file of its own, whole or not there at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lora_align import processes, runs
from lora_align.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Table

KEY = "key"  # the column that says which piece of work a row is the answer to
UNFINISHED = ".unfinished"
GOES_ON = "make room and say it again: finished rows are kept"
SUFFIXES = (".jsonl", ".parquet")  # of the files that are made of shards


class Shards:
    """A folder of Parquet files, numbered as they were written. Its rows' keys say what need not be done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.look()

    def look(self) -> None:
        """What has been written by now, by all processes."""
        self.files = sorted(self.folder.glob("part-*.parquet"))

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
        from pyarrow.parquet import write_table

        number = int(self.files[-1].stem.split("-")[1]) + 1 if self.files else 0
        whose = f"-{processes.number()}" if processes.number() else ""
        file = self.folder / f"part-{number:06d}{whose}.parquet"
        unfinished, table = file.with_suffix(UNFINISHED), _table(rows)
        with runs.writing(self.folder, GOES_ON, table.nbytes), unfinished.open("wb") as stream:
            write_table(table, stream)
            stream.flush()
            os.fsync(stream.fileno())
            unfinished.rename(file)
            runs.sync(self.folder, contents=False)
        self.files.append(file)


@contextmanager
def opened(folder: Path) -> Iterator[Shards]:
    """The shards in a folder, for one program at a time; what a killed one left unfinished is cleared away."""
    lock = FileLock(folder / ".lock")
    try:
        processes.by_first(lambda: _taken(folder, lock))
        store = Shards(folder)
        processes.meet()  # before anybody adds to it
        yield store
    finally:
        lock.release()


def _taken(folder: Path, lock: FileLock) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is being written by another process") from None
    except OSError as fault:
        raise UserError(f"cannot write {folder.parent}: {fault.strerror}; choose another folder") from fault
    for left in folder.glob(f"*{UNFINISHED}"):
        left.unlink()


def check_out(out: Path) -> None:
    """Refuse a file that cannot be made; asked before anything slow begins."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: a {' or '.join(SUFFIXES)} file")
    runs.refuse_missing_parent(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")


@contextmanager
def towards(out: Path, settings: Mapping[str, Any]) -> Iterator[Shards]:
    """The shards a file is to be made of, in a hidden folder beside it; `finish` makes it of them.

    What was begun with other settings is refused.
    """
    with opened(_parts(out)) as store:
        same_work(_parts(out), settings)
        yield store


def finish(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the file, and clear the shards away."""
    write(rows, out)
    shutil.rmtree(_parts(out))


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The whole file, or none."""
    unfinished = out.with_name(f".{out.name}{UNFINISHED}")
    try:
        if out.suffix == ".parquet":
            from pyarrow.parquet import write_table

            table = _table(rows)
            with runs.writing(out, GOES_ON, table.nbytes):
                write_table(table, unfinished)
        else:
            lines = [f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode() for row in rows]
            with runs.writing(out, GOES_ON, sum(map(len, lines))), unfinished.open("wb") as stream:
                stream.writelines(lines)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def same_work(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with shards that were begun with other settings."""
    processes.by_first(lambda: _same_work(folder, settings))


def _same_work(folder: Path, settings: Mapping[str, Any]) -> None:
    file, text = folder / "settings.json", json.dumps(settings, sort_keys=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    changed = [key for key in settings if before.get(key) != json.loads(text)[key]]
    if before and changed:
        raise UserError(f"{folder} was begun with another {', '.join(changed)}; delete it, or choose another name")
    unfinished = file.with_suffix(UNFINISHED)
    unfinished.write_text(text)
    unfinished.replace(file)


def _table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """With every column that some row has; pyarrow by itself takes those of the first."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def _parts(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")

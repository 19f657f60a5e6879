"""Crash-safe files of rows: whole tables, and the batches of `generate`, `score` and `rsf` as Parquet files."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from lora_align import distributed, store
from lora_align.console import Screen
from lora_align.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Table

KEY = "key"  # the column with the key of the work item that a row belongs to
REMEDY = "free disk space and run the command again: finished rows are stored"
SUFFIXES = (".jsonl", ".parquet")  # suffixes of --out files


class Keyed(Protocol):
    """An item of work. Its key is stored in each of its rows."""

    @property
    def key(self) -> str: ...


Work = TypeVar("Work", bound=Keyed)
Rows = Sequence[Mapping[str, Any]]
Done = Callable[[int], None]  # reports how many items of a batch are done


class Shards:
    """A folder of numbered Parquet files. The keys of its rows say which work is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """List the files that all processes have written so far."""
        self.files = sorted(self.folder.glob("part-*.parquet"))

    def keys(self) -> set[str]:
        """Return the keys of all rows."""
        from pyarrow.parquet import read_table

        return {key for file in self.files for key in read_table(file, columns=[KEY])[KEY].to_pylist()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows in the order of writing."""
        from pyarrow.parquet import read_table

        for file in self.files:
            yield from read_table(file).to_pylist()

    def delete(self) -> None:
        """Delete the folder."""
        delete(self.folder)

    def append(self, rows: Rows) -> None:
        """Write a batch to a new file."""
        from pyarrow.parquet import write_table

        number = int(self.files[-1].stem.split("-")[1]) + 1 if self.files else 0
        rank = f"-{distributed.rank()}" if distributed.rank() else ""
        file = self.folder / f"part-{number:06d}{rank}.parquet"
        table = _table(rows)
        with store.report_write_errors(self.folder, REMEDY, table.nbytes), store.new_file(file) as unfinished:
            write_table(table, unfinished)
        self.files.append(file)

    def fill(
        self,
        work: Sequence[Work],
        size: int,
        rows_of: Callable[[Sequence[Work], Done], Rows],
        screen: Screen,
        title: str,
    ) -> None:
        """Append `rows_of(batch, done)` for all work that has no rows yet, in batches of `size`.

        `rows_of` may call `done` with the number of items of the batch that are done.
        """
        done = self.keys()
        left = [item for item in work if item.key not in done]
        if done:
            screen.note(f"{title}: done before: {len(work) - len(left):,} of {len(work):,}")
        with screen.progress(title, len(left)) as progress:
            for begin in range(0, len(left), size):
                batch = left[begin : begin + size]

                def done_of_batch(number: int, begin: int = begin, size: int = len(batch)) -> None:
                    if number < size:
                        progress.show(begin + number, {})

                if rows := rows_of(batch, done_of_batch):
                    self.append(rows)
                progress.show(begin + len(batch), {})


def delete(folder: Path) -> None:
    """Delete a folder of shards, on rank 0."""
    distributed.on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))


@contextmanager
def opened(folder: Path) -> Iterator[Shards]:
    """Lock a folder, remove unfinished files of a killed program, and yield its shards."""
    lock = FileLock(folder / ".lock")
    try:
        distributed.on_rank_0(lambda: _lock_and_clean(folder, lock))
        parts = Shards(folder)
        distributed.barrier()  # all ranks list the files before any rank adds one
        yield parts
    finally:
        lock.release()


def _lock_and_clean(folder: Path, lock: FileLock) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is being written by another process; wait until it ends") from None
    except OSError as fault:
        raise UserError(f"cannot write {folder.parent}: {fault.strerror}; choose another folder") from fault
    for left in folder.glob(f"*{store.UNFINISHED}"):
        left.unlink()


def check_out_file(out: Path) -> None:
    """Refuse an --out file that cannot be written. Call this before slow work."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a {' or '.join(SUFFIXES)} file")
    store.refuse_missing_parent(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")


@contextmanager
def shards_for(out: Path, settings: Mapping[str, Any]) -> Iterator[Shards]:
    """Yield the shards of an --out file, which lie in a hidden folder beside it. `finish` writes the file itself.

    Shards that were begun with other settings are refused.
    """
    with opened(_parts(out)) as parts:
        check_settings(_parts(out), settings)
        yield parts


def finish(rows: Rows, out: Path) -> None:
    """Write the file and delete its shards."""
    write(rows, out)
    shutil.rmtree(_parts(out))


def write(rows: Rows, out: Path) -> None:
    """Write rows to a .jsonl or .parquet file, completely or not at all."""
    if out.suffix == ".parquet":
        from pyarrow.parquet import write_table

        table = _table(rows)
        with store.report_write_errors(out, REMEDY, table.nbytes), store.new_file(out) as unfinished:
            write_table(table, unfinished)
    else:
        text = "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows)
        with store.report_write_errors(out, REMEDY, len(text)), store.new_file(out) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="\n")


def check_settings(
    folder: Path, settings: Mapping[str, Any], remedy: str = "delete the folder or choose another name"
) -> None:
    """Refuse to continue shards that were begun with other settings."""
    distributed.on_rank_0(lambda: _refuse_other_settings(folder, settings, remedy))


def _refuse_other_settings(folder: Path, settings: Mapping[str, Any], remedy: str) -> None:
    file, text = folder / "settings.json", json.dumps(settings, sort_keys=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    changed = [key for key in settings if before.get(key) != json.loads(text)[key]]
    if before and changed:
        raise UserError(f"{folder} was begun with other settings ({', '.join(changed)}); {remedy}")
    with store.report_write_errors(folder, REMEDY, len(text)), store.new_file(file) as unfinished:
        unfinished.write_text(text)


def _table(rows: Rows) -> "Table":
    """Return a table with the columns of all rows; pyarrow would use those of the first row only."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def _parts(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")

"""Where rows come from: the built-in world, files, and data sets on the hub."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora_align import runs
from lora_align.errors import NotFetchedError, UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row | UserError]]  # each with the place it stands in, or what is wrong with it
Found = TypeVar("Found")
INVALID = "invalid row"  # a reason to drop one
SEVERAL, NO_SUBSET = "Config name is missing", ("BuilderConfig", "find cache for")  # as datasets says it


class Source(Protocol):
    """A recipe's table that names data."""

    @property
    def data(self) -> str:
        """A name, a file or a hub id."""

    @property
    def split(self) -> str:
        """Of a data set on the hub."""

    @property
    def revision(self) -> str:
        """Of a data set on the hub."""

    @property
    def subset(self) -> str:
        """Of a data set on the hub: a part that it names, or a folder of it."""

    @property
    def columns(self) -> Mapping[str, str]:
        """What a column is to be called → what it is called there."""

    @property
    def skip_bad(self) -> bool:
        """Whether rows that cannot be read are counted instead of refused."""


def read(source: Source, form: Callable[[Row, str], Found], dropped: Counter[str]) -> Iterator[tuple[str, Found]]:
    """Every row of a source in a form, with its place; what cannot be read ends it, or is counted."""
    for where, row in rows(*place(source)):
        try:
            if isinstance(row, UserError):
                raise row
            found = form(_renamed(row, source.columns, where), where)
        except UserError:
            if not source.skip_bad:
                raise
            dropped[INVALID] += 1
        else:
            yield where, found


def good_rows(data: str) -> Iterator[tuple[str, Row]]:
    """Every row of a source with its place; the first that is none ends it."""
    for where, row in rows(data):
        if isinstance(row, UserError):
            raise row
        yield where, row


def place(source: Source) -> tuple[str, str, str, str]:
    """Where its rows lie."""
    return source.data, source.split, source.revision, source.subset


def name(source: Source) -> str:
    """What a person calls it."""
    return _named(source.data, source.subset)


def rows(data: str, split: str = "train", revision: str = "", subset: str = "") -> Rows:
    """Every row of a source with the place it stands in, or what is wrong with it."""
    if data.startswith("demo:"):
        from lora_align.demo import source

        return source.rows(data)
    file = _file(data)
    if file:
        return _FILES[file.suffix.lower()](file)
    table = _table(data, split, revision, subset)
    return ((f"{_named(data, subset)} {split}[{index}]", row) for index, row in enumerate(table))


def _named(data: str, subset: str) -> str:
    return f"{data} {subset}" if subset else data


def identity(source: Source) -> str:
    """What names a source's rows before they are read; those of the built-in world are this program's own."""
    if source.data.startswith("demo:"):
        return source.data
    file = _file(source.data)
    return runs.sha256(file) if file else str(_table(*place(source))._fingerprint)


def _file(data: str) -> Path | None:
    """The file that a name means; None for a hub id."""
    path = Path(data).expanduser()
    if path.suffix.lower() in _FILES:
        if not path.is_file():
            raise UserError(f"no data file {data!r} (looked in {Path.cwd()})")
        return path
    if path.is_dir() or data.count("/") != 1:
        raise UserError(f"data {data!r} is neither a {', '.join(_FILES)} file nor a data set's hub id (owner/name)")
    return None


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r} (it has: {', '.join(map(str, row))})")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


# --- places ---


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as stream:  # bytes: text mode would also split at U+2028 and friends
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _json(path: Path) -> Rows:
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise UserError(f"{path}: expected a list of objects")
    yield from ((f"{path}[{index}]", row) for index, row in enumerate(table))


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (ArrowInvalid, OSError) as fault:
        raise UserError(f"{path}: not a whole Parquet file: {fault}") from fault


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, UserError(f"{where}: not as many fields as its header; quote text that holds commas")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as fault:
            raise UserError(f"{path}:{reader.line_num + 1}: {fault}") from fault


def _lines(path: Path) -> Rows:
    """Plain text: a prompt a line."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", {"prompt": line.decode("utf-8-sig").strip()}
            except UnicodeDecodeError as fault:
                raise UserError(f"{path}:{number}: {fault}") from fault


_FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _lines,
}


def _table(data: str, split: str, revision: str, subset: str) -> "Dataset":
    """A data set on the hub, or in its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return _subset(partial(datasets.load_dataset, split=split), data, revision or None, subset)
    except datasets.exceptions.DatasetNotFoundError as fault:
        if "gated" in str(fault):  # datasets drops the cause
            page = f"https://huggingface.co/datasets/{data}"
            raise UserError(f"data {data!r} is gated: accept its terms at {page}, then `hf auth login`") from fault
        raise UserError(f"data {data!r}: {first_line(fault)} (a private one needs `hf auth login`)") from fault
    except ConnectionError as fault:
        why = first_line(fault)
        raise NotFetchedError(f"data {data!r} is not in the cache and could not be fetched: {why}") from fault
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as fault:
        why = first_line(fault.__cause__ or fault)
        if SEVERAL in why:
            _, _, names = str(fault).partition("[")
            why = f"it has several subsets, [{names.partition(']')[0]}]; `subset` in the recipe's table names one"
        raise UserError(f"data {data!r} (split {split!r}) could not be read: {why}") from fault


def _subset(load: Callable[..., "Dataset"], data: str, revision: str | None, name: str) -> "Dataset":
    """What the data set calls by that name, else its folder of that name; without one its default part."""
    try:
        return load(data, name=name or None, revision=revision)
    except (ValueError, ConnectionError) as fault:
        unnamed = isinstance(fault, ConnectionError) or any(words in str(fault) for words in NO_SUBSET)
        if not name or not unnamed:
            raise
        folder = _folder(data, revision, name)
        if not folder and isinstance(fault, ConnectionError):
            raise
        if not folder:
            raise UserError(f"data {data!r} has no subset and no folder {name!r}: {first_line(fault)}") from fault
    return load(str(folder))


def _folder(data: str, revision: str | None, name: str) -> Path | None:
    """A folder of a data set, fetched alone, or as it lies in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns=f"{name}/*")
    except LocalEntryNotFoundError:
        return None
    folder = Path(root, name)
    return folder if folder.is_dir() and ".." not in folder.parts else None


def _object(line: bytes, where: str) -> Row | UserError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as fault:
        return UserError(f"{where}: not valid JSON: {fault}")
    return row if isinstance(row, dict) else UserError(f"{where}: expected an object, found {type(row).__name__}")

"""Data sources: read rows from files (JSONL, JSON, CSV, Parquet, text), the hub, or the demo world."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora_align import store
from lora_align.console import count
from lora_align.data import forms
from lora_align.data.rows import Row as Row
from lora_align.data.rows import texts
from lora_align.errors import NotFetchedError, UserError, first_line, nearest
from lora_align.plugins import Registry

if TYPE_CHECKING:
    from datasets import Dataset

Rows = Iterator[tuple[str, Row | UserError]]  # (place, row or the fault that makes it unreadable)
Parsed = TypeVar("Parsed")
SOURCES: Registry[Callable[[str], Rows]] = Registry("sources")
INVALID = "invalid row"  # a reason to drop a row
UNREAD = "column not read: "  # prefix of counts of unread columns, beside those of dropped rows; see `pop_unread`
OPTIONAL = (  # columns that other trainers use and no form requires; some forms read some of them
    "system", "system_prompt", "history", "query", "tools", "images", "videos", "audios",
)  # fmt: skip
ASKED = {  # columns that may hold a part of the prompt
    "system", "system_prompt", "prompt", "instruction", "input", "history", "context", "query", "question", "tools",
}  # fmt: skip
RENAME_IN_FILE = "rename the column in the data"  # the remedy for data without a recipe table
JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.S)  # strings hide the brackets inside them
SEVERAL, NO_SUBSET = "Config name is missing", ("BuilderConfig", "find cache for")  # parts of errors of `datasets`


class Source(Protocol):
    """A recipe table that names data. `split`, `revision` and `subset` apply to datasets on the hub."""

    @property
    def data(self) -> str:
        """`demo:…`, a file, or a hub id."""

    @property
    def split(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def subset(self) -> str:
        """A configuration or a folder of the dataset."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Known column name → its name in the data."""

    @property
    def skip_bad(self) -> bool:
        """Return whether unreadable rows are counted and skipped instead of refused."""


class TrackedRow(dict[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.seen.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """Return the cell, or `default`, and record the read."""
        return self[column] if column in self else default  # noqa: SIM401 (would call this method itself)

    def unread(self, shape: Any) -> list[str]:
        """Return the known columns that were not read and whose text is not in the resulting shape either."""
        filled = [
            (name, value) for name in _known_columns() if name not in self.seen and (value := dict.get(self, name))
        ]
        present = texts(shape) if filled else set()
        return [name for name, value in filled if not present.issuperset(_cell_texts(value))]


def unchanged(row: Row) -> Row:
    return row


def read(
    source: Source,
    read_row: Callable[[Row, str], Parsed],
    dropped: Counter[str],
    transform: Callable[[Row], Row] = unchanged,
) -> Iterator[tuple[str, Parsed]]:
    """Yield every row of a source, read with `read_row`, with its place.

    `transform` is applied to each row first. An unreadable row raises, or is counted in `dropped` if the source sets
    `skip_bad`. Known columns that `read_row` does not read are counted, too. If no row can be read, the first fault is
    raised.
    """
    fault, good = None, 0
    skip = "" if source.skip_bad else ", or skip such rows with skip_bad = true"
    remedy = f"name your columns in `columns`{skip}"
    for where, row in rows(*location(source)):
        try:
            if isinstance(row, UserError):
                raise row
            tracked = TrackedRow(transform(_renamed(row, source.columns, where)))
            parsed = _read_row(read_row, tracked, where, remedy)
        except UserError as refused:
            if not source.skip_bad:
                raise
            dropped[INVALID] += 1
            fault = fault or refused
        else:
            good += 1
            if parsed is not None:  # None means that [eval]'s `where` excludes the row
                dropped.update(UNREAD + column for column in tracked.unread(parsed))
            yield where, parsed
    if fault and not good:
        raise UserError(f"{fault} (no other row can be read either)")


def readable_rows(source: Source, read_row: Callable[[Row, str], Parsed]) -> Iterator[tuple[str, Parsed]]:
    """Yield the rows that `read_row` can read, with their places. Used for a first pass, before `read`."""
    for where, row in rows(*location(source)):
        with suppress(UserError):
            if not isinstance(row, UserError):
                yield where, read_row(_renamed(row, source.columns, where), where)


def pop_unread(counts: Counter[str]) -> dict[str, int]:
    """Remove the columns that were not read from `counts`, and return them with their numbers of filled rows."""
    return {name.removeprefix(UNREAD): counts.pop(name) for name in sorted(counts) if name.startswith(UNREAD)}


def unread_warnings(columns: Mapping[str, int], remedy: str = "rename it with `columns`") -> list[str]:
    """Return a warning for each known column that was not read; `remedy` is how a command's user can rename it."""
    return [
        f"column {name!r} is filled in {count(rows, 'row')} but not read; if it is part of the prompt, {remedy}"
        for name, rows in columns.items()
    ]


@cache
def _known_columns() -> tuple[str, ...]:
    """Return every column with text or turns that some form reads, and the OPTIONAL ones."""
    return (*OPTIONAL, *forms.text_columns())


def _cell_texts(value: Any) -> list[Any]:
    """Return the text of a cell, or of each of its turns; None for anything else."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list | tuple) else [value]
    texts = [turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None for turn in turns]
    return [text if isinstance(text, str) else None for text in texts]


def rows_or_raise(data: str) -> Iterator[tuple[str, Row]]:
    """Yield every row of a source with its place; raise at the first unreadable row."""
    for where, row in rows(data):
        if isinstance(row, UserError):
            raise row
        yield where, row


def read_all(data: str, read_row: Callable[[Row, str], Parsed], unread: Counter[str]) -> Iterator[tuple[Row, Parsed]]:
    """Yield every row of a source, unchanged and as read by `read_row`. Count the ASKED columns that are not read.

    `data` has no recipe table, so a row cannot be skipped and its columns cannot be renamed.
    """
    for where, row in rows_or_raise(data):
        tracked = TrackedRow(row)
        parsed = _read_row(read_row, tracked, where, RENAME_IN_FILE)
        unread.update(name for name in tracked.unread(parsed) if name in ASKED)
        yield row, parsed


def _read_row(read_row: Callable[[Row, str], Parsed], row: Row, where: str, remedy: str) -> Parsed:
    """Read a row; an error about its columns says how to name them with this command."""
    try:
        return read_row(row, where)
    except forms.UnknownFormError as unknown:
        raise UserError(f"{unknown}; {remedy}") from unknown


def location(source: Source) -> tuple[str, str, str, str]:
    """Return the values that locate a source's rows: data, split, revision, subset."""
    return source.data, source.split, source.revision, source.subset


def name(source: Source) -> str:
    """Return a source's name for messages."""
    return _named(source.data, source.subset)


def rows(data: str, split: str = "train", revision: str = "", subset: str = "") -> Rows:
    """Return the rows of a source, each with its place or as the fault that makes it unreadable."""
    if source := _registered(data):
        return source(data)
    file = _file(data)
    if file:
        return _FILES[file.suffix.lower()](file)
    table = _table(data, split, revision, subset)
    return ((f"{_named(data, subset)} {split}[{index}]", row) for index, row in enumerate(table))


def _named(data: str, subset: str) -> str:
    return f"{data} {subset}" if subset else data


def fingerprint(source: Source) -> str:
    """Return a fingerprint of a source's rows without parsing them.

    A registered source has the text after `data =` as its fingerprint: its rows must depend on that text only.
    """
    if _registered(source.data):
        return source.data
    file = _file(source.data)
    return store.sha256(file) if file else str(_table(*location(source))._fingerprint)


def _registered(data: str) -> Callable[[str], Rows] | None:
    """Return the registered source that a name such as `demo:pairs` begins with, if any."""
    prefix, colon, _ = data.partition(":")
    return SOURCES.get(prefix) if colon else None


def _file(data: str) -> Path | None:
    """Return the file that `data` names; None for a hub id."""
    path = Path(data).expanduser()
    if path.suffix.lower() in _FILES:
        if not path.is_file():
            raise UserError(f"no data file {data!r}{_near(path)} (looked in {Path.cwd()})")
        return path
    if any(Path(f"{path}{suffix}").is_file() for suffix in _FILES):
        raise UserError(f"no data file {data!r}{_near(path)}")
    if path.is_dir() or data.count("/") != 1:
        raise UserError(f"data {data!r} is neither a file ({', '.join(_FILES)}) nor a dataset's hub id (owner/name)")
    return None


def _near(path: Path) -> str:
    """Suggest the data file with the nearest name in the same folder."""
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return nearest(path.name, [file.name for file in files if file.suffix.lower() in _FILES])


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r} (it has: {', '.join(map(str, row))})")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


# --- file formats ---


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as stream:  # bytes, because text mode also splits at U+2028 and similar characters
        begun = False
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if not begun and line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[":  # a row is an object, which begins with {
                raise UserError(f"{path}:{number}: not valid JSON Lines; a list of rows is a .json file: rename it")
            begun = True
            yield _object(line, f"{path}:{number}")


def _json(path: Path) -> Rows:
    """Read a list of objects one by one, so that a fault has a line number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: {fault}") from fault
    if not text.lstrip().startswith("["):
        lines = "; one object per line is a .jsonl file" if text.lstrip().startswith("{") else ""
        raise UserError(f"{path}: expected a list of objects{lines}")
    decoder, at, index = json.JSONDecoder(), _next(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as fault:
            where, found_end = f"{path}:{_line(text, at)}", _end_of_value(text, at)
            refused = UserError(f"{where}: row {index}: {_invalid(fault)}")
            if found_end is None:
                raise refused from fault
            yield where, refused
            end = found_end
        else:
            yield _checked(row, f"{path}[{index}]")
        at = end
        index, at = index + 1, _next(text, at)
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif text[at : at + 1] != "]":
            raise UserError(f"{path}:{_line(text, at)}: not valid JSON: expected a comma, or ] at the end of the list")
    if _next(text, at + 1) < len(text):
        raise UserError(f"{path}:{_line(text, at)}: not valid JSON: text after the list")


def _end_of_value(text: str, at: int) -> int | None:
    """Return the end of an object or list that cannot be decoded, by its brackets; None if they do not balance."""
    open_ = []
    for token in JSON_BRACKETS.finditer(text, at):
        if token[0] in "{[":
            open_.append("}" if token[0] == "{" else "]")
        elif token[0] in "}]" and (not open_ or open_.pop() != token[0]):
            return None
        if not open_:
            return token.end() if token[0] in "}]" else None
    return None


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _next(text: str, at: int) -> int:
    """Return the index of the next character that is not white space."""
    match = JSON_SPACE.match(text, at)
    return match.end() if match else at


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
        raise UserError(f"{path}: not a complete Parquet file: {fault}") from fault


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(stream)
        try:
            _check_commas(path, reader.fieldnames or [])
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, UserError(f"{where}: more or fewer fields than the header; quote text with commas")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as fault:
            raise UserError(f"{path}:{reader.line_num + 1}: {fault}") from fault


def _check_commas(path: Path, header: Sequence[str]) -> None:
    """Refuse a table whose fields are separated by something other than commas."""
    separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
    if len(header) == 1 and (present := [name for sign, name in separators.items() if sign in header[0]]):
        raise UserError(f"{path}:1: fields are separated by {present[0]}; save the table with commas between them")


def _lines(path: Path) -> Rows:
    """Read plain text with one prompt per line."""
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
    """Load a dataset from the hub or from its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return _subset(partial(datasets.load_dataset, split=split), data, revision or None, subset)
    except datasets.exceptions.DatasetNotFoundError as fault:
        if "gated" in str(fault):  # `datasets` does not keep the cause
            page = f"https://huggingface.co/datasets/{data}"
            raise UserError(f"data {data!r} is gated: accept its terms at {page}, then run `hf auth login`") from fault
        raise UserError(f"data {data!r}: {first_line(fault)}; for a private dataset, run `hf auth login`") from fault
    except ConnectionError as fault:
        why = first_line(fault)
        raise NotFetchedError(f"data {data!r} is not in the cache and could not be fetched: {why}") from fault
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as fault:
        why = first_line(fault.__cause__ or fault)
        if SEVERAL in why:
            _, _, names = str(fault).partition("[")
            why = f"it has several subsets, [{names.partition(']')[0]}]; choose one with `subset` in the recipe's table"
        raise UserError(f"data {data!r} (split {split!r}) could not be read: {why}") from fault


def _subset(load: Callable[..., "Dataset"], data: str, revision: str | None, name: str) -> "Dataset":
    """Load a dataset's configuration `name`, or else its folder `name`; "" loads the default configuration."""
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
    """Fetch one folder of a dataset, or return it from the cache; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns=f"{name}/*")
    except LocalEntryNotFoundError:
        return None
    folder = Path(root, name)
    return folder if folder.is_dir() and ".." not in folder.parts else None


def _object(line: bytes, where: str) -> tuple[str, Row | UserError]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        array = "; a list of rows is a .json file" if line.lstrip()[:1] == b"[" else ""
        return where, UserError(f"{where}: {_invalid(fault)}{array}")
    return _checked(row, where)


def _checked(row: Any, where: str) -> tuple[str, Row | UserError]:
    if isinstance(row, dict):
        return where, row
    actual = "a list; a list of rows is a .json file" if isinstance(row, list) else "a single value"
    return where, UserError(f"{where}: expected an object, found {actual}")


def _invalid(fault: Exception) -> str:
    """Describe why JSON could not be parsed."""
    if isinstance(fault, RecursionError):
        return "nested too deeply to be read"
    if isinstance(fault, json.JSONDecodeError | UnicodeDecodeError):
        return f"not valid JSON: {fault}"
    return "not valid JSON: a number has too many digits"  # json's only other ValueError

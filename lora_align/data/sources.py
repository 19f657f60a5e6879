"""Data sources: read the rows of a recipe's table from a file, the hub or a registered source."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from lora_align import store
from lora_align.console import count
from lora_align.data import forms, hub, row_reader
from lora_align.data.files import FILES, Rows
from lora_align.data.rows import Comparison, texts
from lora_align.data.rows import Row as Row
from lora_align.errors import UserError, closest
from lora_align.plugins import Registry
from lora_align.recipe import Source

Parsed = TypeVar("Parsed")
SOURCES: Registry[Callable[[str], Rows]] = Registry("sources")
INVALID = "invalid row"  # a reason to drop a row
UNREAD = "column not read: "  # prefix of the keys that count unread columns in the counter of dropped rows
OPTIONAL = (  # columns that other trainers use and no form requires; some forms read some of them
    "system", "system_prompt", "history", "query", "tools", "images", "videos", "audios",
)  # fmt: skip
ASKED = {  # columns that may hold a part of the prompt
    "system", "system_prompt", "prompt", "instruction", "input", "history", "context", "query", "question", "tools",
    "messages", "conversations", "images", "videos", "audios",
}  # fmt: skip
SKIP = "; to skip such rows, set skip_bad = true"
RENAME_IN_FILE = "rename the column in the data"  # the remedy for data without a recipe table


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
        unread = [name for name, value in filled if not present.issuperset(_cell_texts(value))]
        if isinstance(shape, list) and shape and isinstance(shape[0], Comparison):
            unread += [
                name
                for name in forms.labels(dict(self))
                if name not in self.seen and dict.get(self, name) not in (None, "")
            ]
        return unread


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
    for where, row in rows(source):
        try:
            if isinstance(row, UserError):
                raise row
            tracked = TrackedRow(transform(_renamed(row, source.columns, where)))
            parsed = _read_row(read_row, tracked, where, remedy)
        except UserError as refused:
            if not source.skip_bad:
                hint = "" if "skip_bad" in str(refused) else SKIP
                raise UserError(f"{refused}{hint}") from refused
            dropped[INVALID] += 1
            fault = fault or refused
        else:
            good += 1
            if parsed:  # None means that [eval]'s `where` excludes the row, [] that it has too few answers
                dropped.update(UNREAD + column for column in tracked.unread(parsed))
            yield where, parsed
    if fault and not good:
        raise UserError(f"{fault} (no other row can be read either)")


def readable_rows(source: Source, read_row: Callable[[Row, str], Parsed]) -> Iterator[tuple[str, Parsed]]:
    """Yield the rows that `read_row` can read, with their places. Used for a first pass, before `read`."""
    for where, row in rows(source):
        with suppress(UserError):
            if not isinstance(row, UserError):
                yield where, read_row(_renamed(row, source.columns, where), where)


def pop_unread(counts: Counter[str]) -> dict[str, int]:
    """Remove the columns that were not read from `counts`, and return them with their numbers of filled rows."""
    return {name.removeprefix(UNREAD): counts.pop(name) for name in sorted(counts) if name.startswith(UNREAD)}


def unread_warnings(columns: Mapping[str, int], remedy: str = "rename it with `columns`") -> list[str]:
    """Return a warning for each known column that was not read; `remedy` is how a command's user can rename it."""
    return [
        f"column {name!r} is filled in {count(rows, 'row')} but not read; "
        + (
            "it looks like a label, but this form does not use it; check the order of chosen and rejected"
            if forms.LABEL.fullmatch(name)
            else f"if it is part of the prompt, {remedy}"
        )
        for name, rows in columns.items()
    ]


@cache
def _known_columns() -> tuple[str, ...]:
    """Return every column with text or turns that some form reads, and the OPTIONAL ones."""
    return (*OPTIONAL, *row_reader.text_columns())


def _cell_texts(value: Any) -> list[Any]:
    """Return the text of a cell, or of each of its turns; None for anything else."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list | tuple) else [value]
    texts = [turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None for turn in turns]
    return [text if isinstance(text, str) else None for text in texts]


def rows_or_raise(data: str) -> Iterator[tuple[str, Row]]:
    """Yield every row of a source with its place; raise at the first unreadable row."""
    for where, row in rows(Source(data)):
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
    except row_reader.UnknownFormError as unknown:
        raise UserError(f"{unknown}; {remedy}") from unknown


def location(source: Source) -> tuple[str, str, str, str]:
    """Return the values that locate a source's rows: data, split, revision, subset."""
    return source.data, source.split, source.revision, source.subset


def name(source: Source) -> str:
    """Return a source's name for messages."""
    on_hub = source.subset and not Path(source.data).suffix
    return f"{source.data} {source.subset}" if on_hub else source.data


def rows(source: Source) -> Rows:
    """Return the rows of a source, each with its place or as the fault that makes it unreadable."""
    if registered := _registered(source.data):
        return registered(source.data)
    file = _file(source.data)
    if file:
        return FILES[file.suffix.lower()](file)
    dataset = hub.load(*location(source))
    return ((f"{name(source)} {source.split} row {number}", row) for number, row in enumerate(dataset, 1))


def fingerprint(source: Source) -> str:
    """Return a fingerprint of a source's rows without parsing them.

    A registered source has the text after `data =` as its fingerprint: its rows must depend on that text only.
    """
    if _registered(source.data):
        return source.data
    file = _file(source.data)
    return store.sha256(file) if file else str(hub.load(*location(source))._fingerprint)


def refuse_missing(data: str) -> None:
    """Refuse a file that does not exist. A hub id and a registered source pass."""
    if not _registered(data):
        _file(data)


def _registered(data: str) -> Callable[[str], Rows] | None:
    """Return the registered source that a name such as `demo:pairs` begins with, if any."""
    prefix, colon, _ = data.partition(":")
    return SOURCES.get(prefix) if colon else None


def _file(data: str) -> Path | None:
    """Return the file that `data` names; None for a hub id."""
    path = Path(data).expanduser()
    if path.suffix.lower() in FILES:
        if not path.is_file():
            looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
            raise UserError(f"no data file {data!r}{_near(path)}{looked}")
        return path
    if path.is_file():
        raise UserError(f"data {data!r}: a file of unknown format; save it as one of {', '.join(FILES)}")
    if any(Path(f"{path}{suffix}").is_file() for suffix in FILES) or (path.suffix and _near(path)):
        raise UserError(f"no data file {data!r}{_near(path)}")
    if path.is_dir() or data.count("/") != 1:
        raise UserError(f"data {data!r} is neither a file ({', '.join(FILES)}) nor a dataset's hub id (owner/name)")
    return None


def _near(path: Path) -> str:
    """Suggest the data file with the nearest name in the same folder."""
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    names = {file.name.casefold(): file.name for file in files if file.suffix.lower() in FILES}
    match = closest(path.name.casefold(), list(names))
    return f", did you mean {names[match]!r}?" if match else ""


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """Return a row under known column names. A name such as `metadata.score` is a value inside a column."""
    renamed = {}
    for ours, theirs in columns.items():
        column, _, key = theirs.rpartition(".")
        holder = row if theirs in row else row.get(column)
        name = theirs if theirs in row else key
        if not isinstance(holder, Mapping) or name not in holder:
            raise UserError(
                f"{where}: no column {theirs!r} (the row has: {', '.join(map(str, row))}); correct `columns`"
            )
        renamed[ours] = holder[name]
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | renamed

"""Where rows come from: the built-in world, files, and data sets on the hub."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora_align import plugins, runs
from lora_align.console import count
from lora_align.data.rows import texts
from lora_align.errors import NotFetchedError, UserError, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row | UserError]]  # each with the place it stands in, or what is wrong with it
Found = TypeVar("Found")
INVALID = "invalid row"  # a reason to drop one
UNREAD = "column not read: "  # begins what is counted beside reasons to drop a row; `unread_in` takes it out
# every column that some form reads text or turns of, and those that trainers of conversations know beside them
KNOWN = (
    "system", "system_prompt", "prompt", "instruction", "input", "history", "context", "query", "question", "messages",
    "conversations", "response", "completion", "completions", "output", "chosen", "rejected", "response_0",
    "response_1", "response_2", "response1", "response2", "output1", "output2", "output_1", "output_2", "tools",
    "images", "videos", "audios",
)  # fmt: skip
ASKED = {  # columns that may be part of what is asked
    "system", "system_prompt", "prompt", "instruction", "input", "history", "context", "query", "question", "tools",
}  # fmt: skip
JSON_SPACE = re.compile(r"[ \t\n\r]*")
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


class Watched(dict[str, Any]):
    """A row that knows which of its columns were read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.seen.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """As any dictionary has it."""
        return self[column] if column in self else default  # noqa: SIM401 (that would be this)

    def unread(self, found: Any) -> list[str]:
        """Known columns that hold what no form has looked at, unless the shape that was found says the same."""
        filled = [(name, value) for name in KNOWN if name not in self.seen and (value := dict.get(self, name))]
        said = texts(found) if filled else set()
        return [name for name, value in filled if not said.issuperset(_said(value))]


def unchanged(row: Row) -> Row:
    """A row as it is."""
    return row


def read(
    source: Source,
    form: Callable[[Row, str], Found],
    dropped: Counter[str],
    changed: Callable[[Row], Row] = unchanged,
) -> Iterator[tuple[str, Found]]:
    """Yield every row of a source in a form, with its place; what cannot be read ends it, or is counted.

    Known columns that the form does not read are counted, too. Where no row at all can be read, the fault of the first
    one ends it, whatever the source says of bad rows.
    """
    fault, good = None, 0
    for where, row in rows(*place(source)):
        try:
            if isinstance(row, UserError):
                raise row
            watched = Watched(changed(_renamed(row, source.columns, where)))
            found = form(watched, where)
        except UserError as refused:
            if not source.skip_bad:
                raise
            dropped[INVALID] += 1
            fault = fault or refused
        else:
            good += 1
            if found is not None:  # None: a row that is not wanted
                dropped.update(UNREAD + column for column in watched.unread(found))
            yield where, found
    if fault and not good:
        raise UserError(f"{fault} (no other row can be read either)")


def sound(source: Source, form: Callable[[Row, str], Found]) -> Iterator[tuple[str, Found]]:
    """Yield every row that can be read in a form, to look at a source before it is read."""
    for where, row in rows(*place(source)):
        with suppress(UserError):
            if not isinstance(row, UserError):
                yield where, form(_renamed(row, source.columns, where), where)


def unread_in(counts: Counter[str]) -> dict[str, int]:
    """Take the columns that were not read out of counts: in how many rows they hold something."""
    return {name.removeprefix(UNREAD): counts.pop(name) for name in sorted(counts) if name.startswith(UNREAD)}


def unread_warnings(columns: Mapping[str, int]) -> list[str]:
    """A sentence for each known column that was not read."""
    return [
        f"column {name!r} is not read, though it holds something in {count(rows, 'row')}: is it part of what is asked? "
        "`columns` gives it the name of what it is"
        for name, rows in columns.items()
    ]


def _said(value: Any) -> list[Any]:
    """The texts that a cell with text or turns consists of."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list | tuple) else [value]
    texts = [turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None for turn in turns]
    return [text if isinstance(text, str) else None for text in texts]


def good_rows(data: str) -> Iterator[tuple[str, Row]]:
    """Every row of a source with its place; the first that is none ends it."""
    for where, row in rows(data):
        if isinstance(row, UserError):
            raise row
        yield where, row


def read_all(data: str, form: Callable[[Row, str], Found], unread: Counter[str]) -> Iterator[tuple[Row, Found]]:
    """Yield every row of a source as it is and in a form; count columns that may be asked and that the form ignores."""
    for where, row in good_rows(data):
        watched = Watched(row)
        found = form(watched, where)
        unread.update(name for name in watched.unread(found) if name in ASKED)
        yield row, found


def place(source: Source) -> tuple[str, str, str, str]:
    """Where its rows lie."""
    return source.data, source.split, source.revision, source.subset


def name(source: Source) -> str:
    """What a person calls it."""
    return _named(source.data, source.subset)


def rows(data: str, split: str = "train", revision: str = "", subset: str = "") -> Rows:
    """Every row of a source with the place it stands in, or what is wrong with it."""
    if source := _registered(data):
        return source(data)
    file = _file(data)
    if file:
        return _FILES[file.suffix.lower()](file)
    table = _table(data, split, revision, subset)
    return ((f"{_named(data, subset)} {split}[{index}]", row) for index, row in enumerate(table))


def _named(data: str, subset: str) -> str:
    return f"{data} {subset}" if subset else data


def identity(source: Source) -> str:
    """What names a source's rows before they are read; those of a registered source are named by themselves."""
    if _registered(source.data):
        return source.data
    file = _file(source.data)
    return runs.sha256(file) if file else str(_table(*place(source))._fingerprint)


def _registered(data: str) -> Callable[[str], Rows] | None:
    """Return the registered source that a name such as `demo:pairs` begins with, if any."""
    prefix, colon, _ = data.partition(":")
    return plugins.load("sources").get(prefix) if colon else None


def _file(data: str) -> Path | None:
    """The file that a name means; None for a hub id."""
    path = Path(data).expanduser()
    if path.suffix.lower() in _FILES:
        if not path.is_file():
            raise UserError(f"no data file {data!r}{_near(path)} (looked in {Path.cwd()})")
        return path
    if any(Path(f"{path}{suffix}").is_file() for suffix in _FILES):
        raise UserError(f"no data file {data!r}{_near(path)}")
    if path.is_dir() or data.count("/") != 1:
        raise UserError(f"data {data!r} is neither a {', '.join(_FILES)} file nor a data set's hub id (owner/name)")
    return None


def _near(path: Path) -> str:
    """The data file of the nearest name in the same folder, as a question."""
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    return nearest(path.name, [file.name for file in there if file.suffix.lower() in _FILES])


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
                yield _object(line, f"{path}:{number}")


def _json(path: Path) -> Rows:
    """A list of objects, read one by one: a fault is told with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: {fault}") from fault
    if not text.lstrip().startswith("["):
        lines = "; one object a line is a .jsonl file" if text.lstrip().startswith("{") else ""
        raise UserError(f"{path}: expected a list of objects{lines}")
    decoder, at, index = json.JSONDecoder(), _next(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]":
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as fault:
            raise UserError(f"{path}:{_line(text, at)}: row {index}: {_invalid(fault)}") from fault
        yield _checked(row, f"{path}[{index}]")
        index, at = index + 1, _next(text, at)
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif text[at : at + 1] != "]":
            raise UserError(f"{path}:{_line(text, at)}: not valid JSON: expected a comma, or ] at the end of the list")
    if _next(text, at + 1) < len(text):
        raise UserError(f"{path}:{_line(text, at)}: not valid JSON: more text behind the list")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _next(text: str, at: int) -> int:
    """Where the next character is that is no space."""
    found = JSON_SPACE.match(text, at)
    return found.end() if found else at


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
            _check_commas(path, reader.fieldnames or [])
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, UserError(f"{where}: not as many fields as its header; quote text that holds commas")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as fault:
            raise UserError(f"{path}:{reader.line_num + 1}: {fault}") from fault


def _check_commas(path: Path, header: Sequence[str]) -> None:
    """Refuse a table whose fields something else than commas separates."""
    separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
    if len(header) == 1 and (found := [name for sign, name in separators.items() if sign in header[0]]):
        raise UserError(f"{path}:1: fields are separated by {found[0]}; save the table with commas between them")


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
    found = "a list; a list of rows is a .json file" if isinstance(row, list) else "a single value"
    return where, UserError(f"{where}: expected an object, found {found}")


def _invalid(fault: Exception) -> str:
    """What is wrong with a piece of JSON."""
    if isinstance(fault, RecursionError):
        return "nested too deeply to be read"
    if isinstance(fault, json.JSONDecodeError | UnicodeDecodeError):
        return f"not valid JSON: {fault}"
    return "not valid JSON: a number has too many digits"  # the one thing else that json refuses

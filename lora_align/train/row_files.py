"""Token rows in memory-mapped Arrow files, and lazy sequences of rows."""

import bisect
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from lora_align.model.tokenise import TokenPair, TokenRated, TokenText

if TYPE_CHECKING:
    import pyarrow

Out = TypeVar("Out", covariant=True)


class LazyRows(Sequence[Out]):
    """A sequence that makes a row when it is indexed."""

    def __init__(self, count: int, make: Callable[[int], Out]) -> None:
        self.length, self.make = count, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> Out: ...
    @overload
    def __getitem__(self, at: slice) -> "LazyRows[Out]": ...
    def __getitem__(self, at: int | slice) -> "Out | LazyRows[Out]":
        picked = range(self.length)[at]  # raises the IndexError that ends an iteration
        return self.make(picked) if isinstance(picked, int) else LazyRows(len(picked), lambda i: self.make(picked[i]))


def concat(parts: Sequence[Sequence[Out]]) -> LazyRows[Out]:
    """Concatenate sequences without reading them."""
    ends = list(accumulate(map(len, parts)))

    def row_at(i: int) -> Out:
        part = bisect.bisect_right(ends, i)
        return parts[part][i - ends[part] + len(parts[part])]

    return LazyRows(ends[-1] if ends else 0, row_at)


class RowWriter:
    """An Arrow file to append rows to. The digest covers the rows as they were read, before truncation."""

    def __init__(self, file: Path, row_type: type[Any]) -> None:
        import pyarrow

        self.file, self.schema = file, _schema(row_type)
        self.read = self.written = 0
        self.digest = hashlib.sha256()
        self.stream = pyarrow.OSFile(str(file), "wb")
        self.writer = pyarrow.ipc.new_file(self.stream, self.schema)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.stream.close()

    def add(self, rows: Sequence[tuple[Any, Any]]) -> None:
        """Append rows: each is the row as read, and its tokens. A row without tokens is counted but not stored."""
        import pyarrow

        for raw, _ in rows:
            self.digest.update(json.dumps(asdict(raw)).encode())
        left = [vars(ids) for _, ids in rows if ids is not None]
        columns = [pyarrow.array([row[field.name] for row in left], field.type) for field in self.schema]
        self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        self.read += len(rows)
        self.written += len(left)


def _schema(row_type: type[Any]) -> "pyarrow.Schema":
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    columns = {
        TokenPair: {"prompt": ids, "chosen": ids, "rejected": ids},
        TokenRated: {"prompt": ids, "answer": ids, "ratings": pyarrow.map_(pyarrow.string(), pyarrow.float64())},
        TokenText: {"ids": ids, "labels": ids},
    }
    return pyarrow.schema(columns[row_type])


def rows(file: Path, row_type: type[Any]) -> LazyRows[Any]:
    """Return the rows of a file."""
    import pyarrow

    stored = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    # a table would search all its chunks for every row
    batches = [stored.get_batch(i) for i in range(stored.num_record_batches)]

    def row_at(batch: "pyarrow.RecordBatch", i: int) -> Any:
        values = {name: batch[name][i] for name in batch.schema.names}
        return row_type(
            **{
                name: dict(value.as_py()) if name == "ratings" else value.values.to_numpy().tolist()
                for name, value in values.items()
            }
        )

    return concat([LazyRows(len(batch), partial(row_at, batch)) for batch in batches])

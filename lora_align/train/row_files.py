"""Rows of token ids in files that the system maps into memory as they are looked at."""

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
    """Rows that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Out]) -> None:
        self.length, self.make = count, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> Out: ...
    @overload
    def __getitem__(self, at: slice) -> "LazyRows[Out]": ...
    def __getitem__(self, at: int | slice) -> "Out | LazyRows[Out]":
        picked = range(self.length)[at]  # raises IndexError, by which iteration ends
        return self.make(picked) if isinstance(picked, int) else LazyRows(len(picked), lambda i: self.make(picked[i]))


def concat(parts: Sequence[Sequence[Out]]) -> LazyRows[Out]:
    """Rows of one after those of another."""
    ends = list(accumulate(map(len, parts)))

    def made(at: int) -> Out:
        part = bisect.bisect_right(ends, at)
        return parts[part][at - ends[part] + len(parts[part])]

    return LazyRows(ends[-1] if ends else 0, made)


class RowWriter:
    """A file that rows are appended to; the digest is of what was read, before it was cut."""

    def __init__(self, file: Path, shape: type[Any]) -> None:
        import pyarrow

        self.file, self.schema = file, _schema(shape)
        self.read = self.kept = 0
        self.digest = hashlib.sha256()
        self.stream = pyarrow.OSFile(str(file), "wb")
        self.writer = pyarrow.ipc.new_file(self.stream, self.schema)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.stream.close()

    def add(self, rows: Sequence[tuple[Any, Any]]) -> None:
        """Rows as they were read, each with its tokens if any are left."""
        import pyarrow

        for raw, _ in rows:
            self.digest.update(json.dumps(asdict(raw)).encode())
        left = [vars(ids) for _, ids in rows if ids is not None]
        columns = [pyarrow.array([row[field.name] for row in left], field.type) for field in self.schema]
        self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        self.read += len(rows)
        self.kept += len(left)


def _schema(shape: type[Any]) -> "pyarrow.Schema":
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    of = {
        TokenPair: {"prompt": ids, "chosen": ids, "rejected": ids},
        TokenRated: {"prompt": ids, "answer": ids, "ratings": pyarrow.map_(pyarrow.string(), pyarrow.float64())},
        TokenText: {"ids": ids, "labels": ids},
    }
    return pyarrow.schema(of[shape])


def rows(file: Path, shape: type[Any]) -> LazyRows[Any]:
    """As they were, each made when it is asked for."""
    import pyarrow

    kept = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    batches = [kept.get_batch(i) for i in range(kept.num_record_batches)]  # as a table, each look would go through all

    def made(batch: "pyarrow.RecordBatch", at: int) -> Any:
        held = {name: batch[name][at] for name in batch.schema.names}
        return shape(
            **{
                name: dict(value.as_py()) if name == "ratings" else value.values.to_numpy().tolist()
                for name, value in held.items()
            }
        )

    return concat([LazyRows(len(batch), partial(made, batch)) for batch in batches])

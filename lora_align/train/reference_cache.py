"""The cache of the start policy's log-probabilities: one sqlite file per start policy, device, dtype and kernel.

The key of an answer is a hash of the token ids of the prompt and the answer. Both directions, all seeds and later runs
therefore share entries, as do other preferences, limits and longer datasets. Any number of processes may write. A
checksum guards every entry: a damaged entry is deleted and computed again.
"""

import hashlib
import json
import sqlite3
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lora_align import distributed, store
from lora_align.console import Screen, count
from lora_align.errors import RunFailedError
from lora_align.model.base import Base, compute_dtype, device, device_name
from lora_align.model.fsdp import keep_in_step
from lora_align.model.logprobs import Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train.row_files import LazyRows

SAVE_EVERY = 60.0  # seconds between two writes; a kill costs about this much work
BATCH = 256  # rows computed between two checks of the time
KEY_BYTES = 16
LOCK_TIMEOUT = 600.0  # seconds to wait while another process writes
Numbers = NDArray[Any]


@dataclass(frozen=True)
class ReferenceCache:
    """The stored log-probabilities of one start policy."""

    file: Path

    @classmethod
    def of(cls, base: Base, start: str) -> "ReferenceCache":
        """Return the cache for a base, a start adapter ("" for none), and this device, dtype and attention kernel."""
        policy = {
            "fingerprint": base.fingerprint,
            "quantization": [base.recipe.quantization, base.recipe.double_quant],
            "dtype": str(compute_dtype(base.recipe)),
            "device": device_name(device(base.recipe)),  # each kind rounds in its own way
            "attention": base.recipe.attention,
            "start": start,
        }
        key = hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()[:16]
        return cls(store.cache_folder() / "references" / f"{key}.sqlite")

    def logprobs(
        self, model: PreTrainedModel, rows: Sequence[Shared], tokens: int, label: str, screen: Screen
    ) -> LazyRows[tuple[float, ...]]:
        """Return the log-probability of every answer of every row. Compute and store those that are not cached."""
        answers = _Answers.of(rows)
        values = self._read(answers, screen)
        unknown: Numbers = np.empty(0, dtype=np.int64)
        if len(rows):
            unknown = np.flatnonzero(np.logical_or.reduceat(np.isnan(values), answers.starts[:-1]))
        # another program may write between the reads of two ranks; a row that any rank misses is computed again
        left = np.unique(np.concatenate(distributed.all_gather(unknown)))
        if len(left) < len(rows):
            screen.note(f"{label}: {len(rows) - len(left):,} of {count(len(rows), 'row')} cached")
        longest_first = left[np.argsort(-answers.lengths[left], kind="stable")]
        mine = longest_first[distributed.rank() :: distributed.world_size()]
        with keep_in_step(model):
            if len(mine):
                self._compute(model, rows, answers, values, mine, MemoryBudget(tokens), label, screen)
        own = answers.of_rows(mine)
        for indices, computed in distributed.all_gather((own, values[own])):
            values[indices] = computed
        values = values[answers.first]
        return LazyRows(len(rows), lambda i: tuple(values[answers.starts[i] : answers.starts[i + 1]].tolist()))

    def _compute(
        self,
        model: PreTrainedModel,
        rows: Sequence[Shared],
        answers: "_Answers",
        values: Numbers,
        which: Numbers,
        budget: MemoryBudget,
        label: str,
        screen: Screen,
    ) -> None:
        """Fill in the missing values of some rows, and store them every SAVE_EVERY seconds."""
        unsaved: list[Numbers] = []
        saved_at = time.monotonic()
        with screen.progress(label, len(which)) as progress:
            try:
                for begin in range(0, len(which), BATCH):
                    batch = which[begin : begin + BATCH]

                    def report(done: int, before: int = begin) -> None:
                        progress.show(before + done, {})

                    computed = answer_logprobs(model, [rows[i] for i in batch], budget, report)
                    indices = answers.of_rows(batch)
                    new = np.isnan(values[indices])  # a cached value stays: an earlier run was trained with it
                    values[indices[new]] = computed.numpy()[new]
                    unsaved.append(indices[new])
                    if time.monotonic() - saved_at > SAVE_EVERY:
                        self._save(answers, values, unsaved)
                        unsaved, saved_at = [], time.monotonic()
            finally:  # a signal must not lose what was computed
                self._save(answers, values, unsaved)

    def _read(self, answers: "_Answers", screen: Screen) -> Numbers:
        """Return the cached value of each answer, NaN if there is none. Delete damaged entries."""
        values = np.full(len(answers.first), np.nan)
        try:
            with self._open() as table:
                table.execute("CREATE TEMP TABLE wanted (answer INTEGER PRIMARY KEY, key BLOB)")
                keys = ((index, answers.key(index)) for index in range(len(values)))
                table.executemany("INSERT INTO wanted VALUES (?, ?)", keys)
                damaged: set[bytes] = set()
                for index, key, value, checksum in table.execute(
                    "SELECT answer, key, value, checksum FROM wanted JOIN logprobs USING (key)"
                ):
                    if value is not None and checksum == _checksum(key, value):
                        values[index] = value
                    else:
                        damaged.add(key)
                table.executemany("DELETE FROM logprobs WHERE key = ?", [(key,) for key in damaged])
            if damaged:
                screen.warn(f"{self.file}: {count(len(damaged), 'damaged value')} deleted and computed again")
        except sqlite3.DatabaseError as fault:
            if fault.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
            screen.warn(f"{self.file} is damaged ({fault}); it is deleted, and its values are computed again")
            self.file.unlink(missing_ok=True)
        return values

    def _save(self, answers: "_Answers", values: Numbers, which: Sequence[Numbers]) -> None:
        """Store new values. A value that another process stored in the meantime stays."""
        new: Numbers = np.concatenate(which) if which else np.empty(0, dtype=np.int64)
        if not len(new):
            return
        # the first answer with the same key may not be computed yet: take the value of one that is
        _, at = np.unique(answers.first[new], return_index=True)
        entries = ((answers.key(index), float(values[index])) for index in new[at].tolist())
        with self._open() as table:
            table.executemany(
                "INSERT OR IGNORE INTO logprobs VALUES (?, ?, ?)",
                ((key, value, _checksum(key, value)) for key, value in entries),
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the table, and commit when the block ends."""
        remedy = f"values that were stored before are intact; {store.CACHE_REMEDY}"
        try:
            with store.report_write_errors(self.file, remedy):
                self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.file, timeout=LOCK_TIMEOUT)) as connection, connection:
                connection.execute("PRAGMA temp_store = MEMORY")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, value REAL NOT NULL, checksum INTEGER)"
                    " WITHOUT ROWID"
                )
                yield connection
        except sqlite3.OperationalError as fault:
            raise RunFailedError(f"{self.file}: {fault}; {remedy}") from fault


@dataclass(frozen=True)
class _Answers:
    """The key of every answer of some rows."""

    keys: bytearray
    first: Numbers  # for each answer, the index of the first one with the same key
    starts: Numbers  # the index of each row's first answer, and the total number of answers
    lengths: Numbers  # the tokens of each row

    @classmethod
    def of(cls, rows: Sequence[Shared]) -> "_Answers":
        """Read the rows once. Store about fifty bytes per answer."""
        keys, starts, lengths = bytearray(), array("q", [0]), array("q")
        for prompt, answers in rows:
            for answer in answers:
                keys += _key(prompt, answer)
            starts.append(starts[-1] + len(answers))
            lengths.append(len(prompt) + sum(map(len, answers)))
        halves = np.frombuffer(keys, dtype=np.int64).reshape(-1, KEY_BYTES // 8)
        _, first, inverse = np.unique(halves, axis=0, return_index=True, return_inverse=True)
        return cls(keys, first[inverse.ravel()], np.array(starts), np.array(lengths))

    def key(self, index: int) -> bytes:
        return bytes(self.keys[KEY_BYTES * index : KEY_BYTES * (index + 1)])

    def of_rows(self, rows: Numbers) -> Numbers:
        """Return the indices of the answers of some rows."""
        parts = [np.arange(self.starts[i], self.starts[i + 1]) for i in rows]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _key(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    digest = hashlib.sha256(array("I", [len(prompt), *prompt, *answer]).tobytes())
    return digest.digest()[:KEY_BYTES]


def _checksum(key: bytes, value: float) -> int:
    return zlib.crc32(np.float64(value).tobytes(), zlib.crc32(key))

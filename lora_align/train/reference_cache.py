"""What a start policy finds of answers, kept on disk: computed once for both directions, all seeds and later runs.

A file holds log-probabilities by the hash of their token ids, so that another preference, a limit or a longer data set
finds what is known already. Files are named by their own hash: any number of processes may write, a damaged one is
passed over, and what it held is computed again.
"""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lora_align import processes, runs
from lora_align.console import Screen, count
from lora_align.model.base import Base, compute_dtype, device
from lora_align.model.fsdp import in_step
from lora_align.model.logprobs import Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train.row_files import LazyRows

if TYPE_CHECKING:
    import pyarrow

KEEP_EVERY = 60.0  # seconds of work that a kill may cost
AT_ONCE = 256  # rows between two looks at the clock
KEY_BYTES = 16
Numbers = NDArray[Any]


@dataclass(frozen=True)
class ReferenceCache:
    """The log-probabilities that one start policy has given so far."""

    folder: Path

    @classmethod
    def of(cls, base: Base, start: str) -> "ReferenceCache":
        """Of a base as it is computed with, and the start adapter over it; the tokens say everything else."""
        who = {
            "fingerprint": base.fingerprint,
            "quantization": [base.recipe.quantization, base.recipe.double_quant],
            "dtype": str(compute_dtype(base.recipe)),
            "device": _device_name(),
            "attention": base.recipe.attention,
            "start": start,
        }
        key = hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()[:16]
        return cls(runs.cache_folder() / "references" / key)

    def logprobs(
        self,
        model: PreTrainedModel,
        rows: Sequence[Shared],
        tokens: int,
        label: str,
        screen: Screen,
    ) -> LazyRows[tuple[float, ...]]:
        """Of every answer of every row. What is not known is computed with the model, and kept."""
        asked = _Asked.of(rows)
        known = self._read(asked, screen)
        unknown: Numbers = np.empty(0, dtype=np.int64)
        if len(rows):
            unknown = np.flatnonzero(np.logical_or.reduceat(np.isnan(known), asked.starts[:-1]))
        # while one process reads, another program may write
        left = np.unique(np.concatenate(processes.all_gather(unknown)))
        if len(left) < len(rows):
            screen.note(f"{label}: {len(rows) - len(left):,} of {count(len(rows), 'row')} were computed before")
        longest_first = left[np.argsort(-asked.lengths[left], kind="stable")]
        mine = longest_first[processes.rank() :: processes.world_size()]
        with in_step(model):
            if len(mine):
                self._compute(model, rows, asked, known, mine, MemoryBudget(tokens), label, screen)
        own = asked.answers(mine)
        for at, found in processes.all_gather((own, known[own])):
            known[at] = found
        known = known[asked.first]
        return LazyRows(len(rows), lambda i: tuple(known[asked.starts[i] : asked.starts[i + 1]].tolist()))

    def _compute(
        self,
        model: PreTrainedModel,
        rows: Sequence[Shared],
        asked: "_Asked",
        known: Numbers,
        which: Numbers,
        room: MemoryBudget,
        label: str,
        screen: Screen,
    ) -> None:
        """Fill in what is not known of some rows, kept now and then."""
        fresh: list[Numbers] = []
        kept_at = time.monotonic()
        with screen.progress(label, len(which)) as progress:
            try:
                for begin in range(0, len(which), AT_ONCE):
                    some = which[begin : begin + AT_ONCE]

                    def done(count: int, at: int = begin) -> None:
                        progress.show(at + count, {})

                    found = answer_logprobs(model, [rows[i] for i in some], room, done)
                    at = asked.answers(some)
                    new = np.isnan(known[at])  # what was known of a row stays as whoever asked before has heard it
                    known[at[new]] = found.numpy()[new]
                    fresh.append(at[new])
                    if time.monotonic() - kept_at > KEEP_EVERY:
                        self._keep(asked, known, fresh)
                        fresh, kept_at = [], time.monotonic()
            finally:  # a signal, too, ends it with what was done
                self._keep(asked, known, fresh)

    def _read(self, asked: "_Asked", screen: Screen) -> Numbers:
        """What files hold of each answer; NaN where none does."""
        import pyarrow.compute
        from pyarrow.parquet import read_table

        found = np.full(len(asked.keys), np.nan)
        for file in sorted(self.folder.glob("*.parquet")):
            if runs.sha256(file)[:32] != file.stem:
                screen.warn(f"{file} is damaged; it is deleted, and what it held is computed again")
                file.unlink(missing_ok=True)
                continue
            table = read_table(file).combine_chunks()
            at = pyarrow.compute.index_in(asked.keys, table["key"].cast(asked.keys.type))
            held = at.is_valid().to_numpy(zero_copy_only=False)
            found[held] = table["logprob"].to_numpy()[at.drop_null().to_numpy()]
        return found

    def _keep(self, asked: "_Asked", known: Numbers, fresh: Sequence[Numbers]) -> None:
        """Some answers, each once."""
        import pyarrow
        from pyarrow.parquet import write_table

        at = np.concatenate([some[asked.first[some] == some] for some in fresh]) if fresh else np.empty(0)
        if not len(at):
            return
        with runs.report_write_errors(self.folder, "what was kept before stays; LORA_ALIGN_CACHE moves the cache"):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".{os.getpid()}.unfinished"
            write_table(pyarrow.table({"key": asked.keys.take(at), "logprob": known[at]}), unfinished)
            with unfinished.open("rb") as stream:
                os.fsync(stream.fileno())
            unfinished.rename(self.folder / f"{runs.sha256(unfinished)[:32]}.parquet")
            runs.sync(self.folder, contents=False)


@dataclass(frozen=True)
class _Asked:
    """Every answer by the hash of its tokens and its prompt's, and which of them are a row's."""

    keys: "pyarrow.FixedSizeBinaryArray"
    first: Numbers  # where each answer's key stands for the first time
    starts: Numbers  # of each row's answers, and the end of the last one's
    lengths: Numbers  # tokens of each row

    @classmethod
    def of(cls, rows: Sequence[Shared]) -> "_Asked":
        """One pass over the rows; what it leaves takes some fifty bytes an answer."""
        import pyarrow
        import pyarrow.compute

        keys, starts, lengths = bytearray(), array("q", [0]), array("q")
        for prompt, answers in rows:
            for answer in answers:
                keys += _key(prompt, answer)
            starts.append(starts[-1] + len(answers))
            lengths.append(len(prompt) + sum(map(len, answers)))
        buffers = [None, pyarrow.py_buffer(keys)]
        named = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(KEY_BYTES), starts[-1], buffers)
        first = pyarrow.compute.index_in(named, named).to_numpy()
        return cls(named, first, np.array(starts), np.array(lengths))

    def answers(self, rows: Numbers) -> Numbers:
        """Places of the answers of some rows."""
        parts = [np.arange(self.starts[i], self.starts[i + 1]) for i in rows]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _device_name() -> str:
    """Name the kind of device, whose kernels round in their own way."""
    where = device()
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def _key(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    digest = hashlib.sha256(array("I", [len(prompt), *prompt, *answer]).tobytes())
    return digest.digest()[:KEY_BYTES]

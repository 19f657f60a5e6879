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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lora_align import processes, runs
from lora_align.console import Screen
from lora_align.model.base import Base, compute_dtype
from lora_align.model.logprobs import Shared, answer_logprobs
from lora_align.model.room import Room

KEEP_EVERY = 60.0  # seconds of work that a kill may cost
AT_ONCE = 256  # rows between two looks at the clock


@dataclass(frozen=True)
class References:
    """The log-probabilities that one start policy has given so far."""

    folder: Path

    @classmethod
    def of(cls, base: Base, start: str) -> "References":
        """Of a base as it is computed with, and the start adapter over it; the tokens say everything else."""
        who = {
            "fingerprint": base.fingerprint,
            "quantization": [base.recipe.quantization, base.recipe.double_quant],
            "dtype": str(compute_dtype(base.recipe)),
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
    ) -> list[tuple[float, ...]]:
        """Of every answer of every row. What is not known is computed with the model, and kept."""
        keys = [[_key(prompt, answer) for answer in answers] for prompt, answers in rows]
        known = self._read({key for row in keys for key in row}, screen)
        unknown = {i for i, row in enumerate(keys) if not all(key in known for key in row)}
        left = sorted(unknown.union(*processes.gathered(unknown)))  # while one reads, another program may write
        if len(left) < len(rows):
            screen.note(f"{label}: {len(rows) - len(left):,} of {len(rows):,} rows were computed before")
        left.sort(key=lambda i: -len(rows[i][0]) - sum(map(len, rows[i][1])))
        left = left[processes.number() :: processes.count()]
        if left:
            room, unkept = Room(tokens), dict[bytes, float]()
            with screen.progress(label, len(left)) as progress:
                kept_at = time.monotonic()
                try:
                    for begin in range(0, len(left), AT_ONCE):
                        some = left[begin : begin + AT_ONCE]
                        found = answer_logprobs(
                            model, [rows[i] for i in some], room, lambda done, at=begin: progress.show(at + done, {})
                        )
                        unkept |= zip((key for i in some for key in keys[i]), found.tolist(), strict=True)
                        if time.monotonic() - kept_at > KEEP_EVERY:
                            known |= self._kept(unkept)
                            unkept, kept_at = {}, time.monotonic()
                finally:  # a signal, too, ends it with what was done
                    known |= self._kept(unkept)
        for others in processes.gathered({key: known[key] for i in left for key in keys[i]}):
            known |= others
        return [tuple(known[key] for key in row) for row in keys]

    def _read(self, wanted: Iterable[bytes], screen: Screen) -> dict[bytes, float]:
        from pyarrow.parquet import read_table

        found: dict[bytes, float] = {}
        wanted = set(wanted)
        for file in sorted(self.folder.glob("*.parquet")):
            if runs.sha256(file)[:32] != file.stem:
                screen.warn(f"{file} is damaged; it is deleted, and what it held is computed again")
                file.unlink()
                continue
            table = read_table(file)
            held = zip(table["key"].to_pylist(), table["logprob"].to_pylist(), strict=True)
            found |= {key: value for key, value in held if key in wanted}
        return found

    def _kept(self, found: Mapping[bytes, float]) -> Mapping[bytes, float]:
        if not found:
            return found
        import pyarrow
        from pyarrow.parquet import write_table

        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{os.getpid()}.unfinished"
        key = pyarrow.array(list(found), pyarrow.binary(16))
        write_table(pyarrow.table({"key": key, "logprob": list(found.values())}), unfinished)
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        unfinished.rename(self.folder / f"{runs.sha256(unfinished)[:32]}.parquet")
        runs.sync(self.folder, contents=False)
        return found


def _key(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    digest = hashlib.sha256(array("I", [len(prompt), *prompt, *answer]).tobytes())
    return digest.digest()[:16]

"""What there is to learn from, as token ids: tokenised once for a source and its settings, and kept on disk.

Rows lie in files that the system maps into memory as they are read, so that a million of them take no more of it than a
thousand. A folder is written whole or not at all, and believed by its hashes.
"""

import bisect
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

from filelock import FileLock

from lora_align import processes, runs
from lora_align.console import Screen
from lora_align.data import pairs, ratings, sources
from lora_align.data.pairs import Split
from lora_align.data.rows import Conversation, Pair, Rated
from lora_align.data.sources import Source
from lora_align.errors import UserError
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.chat_format import ChatFormat
from lora_align.model.tokenise import CUT, TokenPair, TokenRated, TokenText
from lora_align.preference import Preference
from lora_align.recipe import Ratings, Sft

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 256  # rows that are tokenised together
UNUSED_DAYS = 30  # after which kept rows are deleted
FACTS = "facts.json"
SIDES = ("train", "held_out")
Row = TypeVar("Row", TokenPair, TokenRated, TokenText)
Raw = TypeVar("Raw", Pair, Rated, Conversation)
Out = TypeVar("Out", covariant=True)


class View(Sequence[Out]):
    """Rows that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Out]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, at: int) -> Out: ...
    @overload
    def __getitem__(self, at: slice) -> "View[Out]": ...
    def __getitem__(self, at: int | slice) -> "Out | View[Out]":
        picked = range(self.count)[at]  # raises IndexError, by which iteration ends
        return self.make(picked) if isinstance(picked, int) else View(len(picked), lambda i: self.make(picked[i]))


def joined(parts: Sequence[Sequence[Out]]) -> View[Out]:
    """Rows of one after those of another."""
    ends = list(accumulate(map(len, parts)))

    def made(at: int) -> Out:
        part = bisect.bisect_right(ends, at)
        return parts[part][at - ends[part] + len(parts[part])]

    return View(ends[-1] if ends else 0, made)


@dataclass(frozen=True)
class Material(Generic[Row]):
    """Rows to train on, rows held out by their prompt, and what a manifest says of them."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    facts: dict[str, Any]


class Tokenising(Protocol[Raw, Row]):  # type: ignore[misc]
    """One of `tokenise`'s."""

    def __call__(
        self, rows: Sequence[Raw], chat: ChatFormat, max_length: int, counts: Counter[str]
    ) -> list[Row | None]:
        """None for rows of which nothing is left."""


def of_pairs(
    axis: Preference, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> Material[TokenPair]:
    """A preference's pairs."""
    about = {**asdict(axis), "held_out": held_out, "limit": limit}
    read = partial(pairs.read_pairs, axis, held_out, limit)
    return _Keeping(TokenPair, axis, about, base, max_length, screen).kept(read, tokenise.pairs)


def of_ratings(
    table: Ratings, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> Material[TokenRated]:
    """Answers that were rated."""
    about = {**asdict(table), "held_out": held_out, "limit": limit}
    read = partial(ratings.read_ratings, table, held_out, limit)
    return _Keeping(TokenRated, table, about, base, max_length, screen).kept(read, tokenise.rated)


def of_conversations(table: Sft, base: Base, screen: Screen) -> Material[TokenText]:
    """Conversations to learn the assistant's part of, or all."""
    names = ("data", "split", "revision", "columns", "skip_bad", "held_out", "limit", "answers_only")
    about = {name: getattr(table, name) for name in names}
    texts = partial(tokenise.texts, answers_only=table.answers_only)
    keeping = _Keeping(TokenText, table, about, base, table.max_length, screen)
    return keeping.kept(partial(pairs.read_conversations, table), texts)


@dataclass(frozen=True)
class _Keeping(Generic[Row]):
    """One source's rows, and everything that decides what they become."""

    shape: type[Row]
    source: Source
    about: Mapping[str, Any]
    base: Base
    longest: int
    screen: Screen

    @property
    def max_length(self) -> int:
        return min(self.longest, self.base.max_length)

    def kept(self, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]) -> Material[Row]:
        """From disk, where they are kept from here on at the latest."""
        folder = runs.cache_folder() / "tokens" / self._key()
        facts = processes.first_here(lambda: self._made(folder, rows, tokenising))
        train, held_out = (_rows(folder / f"{side}.arrow", self.shape) for side in SIDES)
        return Material(train, held_out, facts["rows"])

    def _made(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]
    ) -> dict[str, Any]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process tokenises, the others wait for it
            facts = _facts(folder)
            if facts is None:
                staging = folder.with_name(f".{folder.name}.staging")
                for old in (staging, folder):
                    shutil.rmtree(old, ignore_errors=True)
                staging.mkdir()
                try:
                    with runs.writing(folder.parent, "rows are kept there; LORA_ALIGN_CACHE moves the cache"):
                        facts = self._written(staging, rows, tokenising)
                        runs.sync(staging)
                        staging.rename(folder)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)  # of what broke off, nothing stays
                _sweep(folder.parent)
        return facts

    def _key(self) -> str:
        """Of the rows, what was said about them, what they become, and the program that reads them."""
        chat = self.base.chat
        parts = [sources.identity(self.source), self.about, self.shape.__name__, self.max_length]
        parts += [chat.fingerprint(), sorted(chat.stop_ids), _program()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _written(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]
    ) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        found, read = rows(dropped), 0
        with (
            _Side(folder / f"{SIDES[0]}.arrow", self.shape) as train,
            _Side(folder / f"{SIDES[1]}.arrow", self.shape) as held_out,
            self.screen.progress(f"reading {self.source.data}", None) as progress,
        ):
            while some := list(islice(found, AT_ONCE)):
                tokens = tokenising([row for row, _ in some], self.base.chat, self.max_length, dropped)
                for side, wanted in ((train, False), (held_out, True)):
                    side.add([(row, ids) for (row, aside), ids in zip(some, tokens, strict=True) if aside == wanted])
                read += len(some)
                progress.show(read, {})
        cut = dropped.pop(CUT, 0)
        if not train.kept:
            raise UserError(f"{self.source.data}: no rows left ({self._why(train.read, held_out.read, dropped)})")
        said = {
            "source": self.source.data,
            "fingerprint": hashlib.sha256(train.digest.digest() + held_out.digest.digest()).hexdigest(),
            "rows": train.kept,
            "held_out": held_out.kept,
            "dropped": dict(dropped),
            "answers_cut": cut,
            "max_length": self.max_length,
        }
        facts = {"rows": said, "files": {side.file.name: runs.sha256(side.file) for side in (train, held_out)}}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return facts

    def _why(self, train: int, held_out: int, dropped: Counter[str]) -> str:
        if train:
            return f"{pairs.reasons(dropped)}; max_length is {self.max_length}"
        aside = f"all {held_out} held out; lower held_out" if held_out else ""
        return ", ".join(filter(None, (aside, pairs.reasons(dropped)))) or "the source is empty"


class _Side:
    """A file that rows are appended to; the digest is of what was read, before it was cut."""

    def __init__(self, file: Path, shape: type[Row]) -> None:
        import pyarrow

        self.file, self.schema = file, _schema(shape)
        self.read = self.kept = 0
        self.digest = hashlib.sha256()
        self.stream = pyarrow.OSFile(str(file), "wb")
        self.writer = pyarrow.ipc.new_file(self.stream, self.schema)

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.stream.close()

    def add(self, rows: Sequence[tuple[Raw, Row | None]]) -> None:
        """Rows as they were read, each with its tokens if any are left."""
        import pyarrow

        for raw, _ in rows:
            self.digest.update(json.dumps(asdict(raw)).encode())
        left = [vars(ids) for _, ids in rows if ids is not None]
        columns = [pyarrow.array([row[field.name] for row in left], field.type) for field in self.schema]
        self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        self.read += len(rows)
        self.kept += len(left)


def _facts(folder: Path) -> dict[str, Any] | None:
    """What is said of kept rows, if they are there and as they were written."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if all(runs.sha256(folder / name) == known for name, known in facts["files"].items()):
            (folder / FACTS).touch()  # has been of use
            return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged: it is made anew
        return None
    return None


def _sweep(folder: Path) -> None:
    """Rows that nobody has asked for of late."""
    for facts in folder.glob(f"*/{FACTS}"):
        if time.time() - facts.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(facts.parent, ignore_errors=True)


def _schema(shape: type[Row]) -> "pyarrow.Schema":
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    of = {
        TokenPair: {"prompt": ids, "chosen": ids, "rejected": ids},
        TokenRated: {"prompt": ids, "answer": ids, "ratings": pyarrow.map_(pyarrow.string(), pyarrow.float64())},
        TokenText: {"ids": ids, "labels": ids},
    }
    return pyarrow.schema(of[shape])


def _rows(file: Path, shape: type[Row]) -> View[Row]:
    import pyarrow

    kept = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    batches = [kept.get_batch(i) for i in range(kept.num_record_batches)]  # as a table, each look would go through all

    def made(batch: "pyarrow.RecordBatch", at: int) -> Row:
        held = {name: batch[name][at] for name in batch.schema.names}
        return shape(
            **{
                name: dict(value.as_py()) if name == "ratings" else value.values.to_numpy().tolist()
                for name, value in held.items()
            }
        )

    return joined([View(len(batch), partial(made, batch)) for batch in batches])


@cache
def _program() -> str:
    """Names this program's code: what another version has kept is not believed."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

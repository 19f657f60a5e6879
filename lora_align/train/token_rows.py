"""Read training rows as token ids from the cache, or tokenise and cache them (`row_files` has the file format).

A million rows take no more memory than a thousand. A source is cached in parts, so a killed program loses at most one.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy
from filelock import FileLock

from lora_align import distributed, store
from lora_align.console import Screen, count
from lora_align.data import pairs, ratings, sources
from lora_align.data.forms import FORMS
from lora_align.data.pairs import Split
from lora_align.data.rows import Conversation, Pair, Rated
from lora_align.errors import UserError
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.chat_format import ChatFormat
from lora_align.model.tokenise import TRUNCATED, TokenPair, TokenRated, TokenText
from lora_align.rankers import RANKERS
from lora_align.recipe import Preference, Ratings, Sft, Source
from lora_align.train import row_files
from lora_align.train.row_files import LazyRows, RowWriter, concat

BATCH = 256  # rows that are tokenised together
UNUSED_DAYS = 30  # cached rows that are not used for this long are deleted
PART = 1 << 16  # rows of a part: a kill loses at most this many
FACTS = "facts.json"
SPLITS = ("train", "held_out")
Row = TypeVar("Row", TokenPair, TokenRated, TokenText)
Raw = TypeVar("Raw", Pair, Rated, Conversation)


@dataclass(frozen=True)
class TokenRows(Generic[Row]):
    """Rows to train on, rows held out by their prompt, and the manifest's facts about both."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    facts: dict[str, Any]


class Tokeniser(Protocol[Raw, Row]):  # type: ignore[misc]
    """A function of the module `tokenise` that tokenises one type of row."""

    def __call__(
        self, rows: Sequence[Raw], chat: ChatFormat, max_length: int, counts: Counter[str]
    ) -> list[Row | None]:
        """Tokenise rows. The result has None for a dropped row."""


def read_token_pairs(
    axis: Preference, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> TokenRows[TokenPair]:
    """Return a preference's pairs as token ids, from the cache if they are there."""
    settings = {**asdict(axis), "held_out": held_out, "limit": limit}
    rows = _CachedRows(TokenPair, axis, settings, base, max_length, screen)
    return rows.read(partial(pairs.read_pairs, axis, held_out, limit), tokenise.pairs)


def read_token_ratings(
    table: Ratings, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> TokenRows[TokenRated]:
    """Return rated answers as token ids, from the cache if they are there."""
    settings = {**asdict(table), "held_out": held_out, "limit": limit}
    rows = _CachedRows(TokenRated, table, settings, base, max_length, screen)
    return rows.read(partial(ratings.read_ratings, table, held_out, limit), tokenise.rated)


def read_token_texts(table: Sft, base: Base, screen: Screen) -> TokenRows[TokenText]:
    """Return conversations as token ids, from the cache if they are there.

    `answers_only` decides whether the assistant's tokens or all tokens are labelled.
    """
    names = ("data", "split", "revision", "subset", "columns", "skip_bad", "held_out", "limit", "answers_only")
    settings = {name: getattr(table, name) for name in names}
    rows = _CachedRows(TokenText, table, settings, base, table.max_length, screen)
    return rows.read(partial(pairs.read_conversations, table), partial(tokenise.texts, answers_only=table.answers_only))


def report_dropped(what: str, facts: Mapping[str, Any], screen: Screen) -> None:
    """Report unread columns, dropped rows and truncated answers of a source, if there are any."""
    for warning in sources.unread_warnings(facts["unread"]):
        screen.warn(f"{what}: {warning}")
    lost = [f"dropped: {pairs.reasons(Counter(facts['dropped']))}"] if facts["dropped"] else []
    lost += [f"answers truncated: {facts['answers_truncated']:,}"] if facts["answers_truncated"] else []
    if lost:
        rows = f"{count(facts['rows'], 'row')} to train on, {facts['held_out']:,} held out"
        screen.note(f"{what}: {rows}; {'; '.join(lost)}")


def no_rows_left(source: Source, read: tuple[int, int], dropped: Counter[str], max_length: int) -> UserError:
    """Return the error for a source without rows to train on; `read` counts the training and held-out rows."""
    train, held_out = read
    lost = pairs.reasons(dropped)
    name = sources.name(source)
    if train:
        return UserError(
            f"{name}: no rows to train on ({lost}); raise max_length (now {max_length}), or check the source"
        )
    if held_out:
        why = ", ".join(filter(None, (f"held out: {held_out:,}", lost)))
        return UserError(f"{name}: no rows to train on ({why}); lower the stage's `held_out`, or use more rows")
    return UserError(f"{name}: no rows to train on ({lost or 'the source is empty'}); check the source")


def interleave(parts: Sequence[TokenRows[Row]]) -> TokenRows[Row]:
    """Interleave several datasets, so that each is spread evenly over the result."""
    if len(parts) == 1:
        return parts[0]
    facts = [part.facts for part in parts]
    merged = {
        "source": " + ".join(fact["source"] for fact in facts),
        "fingerprint": hashlib.sha256("".join(fact["fingerprint"] for fact in facts).encode()).hexdigest(),
        **{name: sum(fact[name] for fact in facts) for name in ("rows", "held_out", "answers_truncated")},
        **{name: dict(sum((Counter(fact[name]) for fact in facts), Counter[str]())) for name in ("dropped", "unread")},
        "max_length": facts[0]["max_length"],
    }
    return TokenRows(_spread([part.train for part in parts]), _spread([part.held_out for part in parts]), merged)


def _spread(parts: Sequence[Sequence[Row]]) -> LazyRows[Row]:
    rows = concat(parts)
    order = numpy.concatenate([numpy.arange(len(part)) / max(len(part), 1) for part in parts]).argsort(kind="stable")
    return LazyRows(len(rows), lambda i: rows[int(order[i])])


@dataclass(frozen=True)
class _CachedRows(Generic[Row]):
    """The rows of one source, and everything that decides their tokens."""

    row_type: type[Row]
    source: Source
    settings: Mapping[str, Any]
    base: Base
    recipe_max_length: int
    screen: Screen

    @property
    def max_length(self) -> int:
        return min(self.recipe_max_length, self.base.max_length)

    def read(self, rows: Callable[[Counter[str]], Split[Raw]], tokenise_rows: Tokeniser[Raw, Row]) -> TokenRows[Row]:
        """Return the rows. Tokenise and cache them first if they are not cached."""
        folder = store.cache_folder() / "tokens" / self._key()
        facts = distributed.local_rank_0_first(lambda: self._cached(folder, rows, tokenise_rows))
        parts = [folder / str(number) for number in range(facts["parts"])]
        train, held_out = (
            concat([row_files.rows(part / f"{split}.arrow", self.row_type) for part in parts]) for split in SPLITS
        )
        return TokenRows(train, held_out, facts["rows"])

    def _key(self) -> str:
        """Return a hash of the source, the settings, the chat format, and the code of this package and of plugins."""
        chat = self.base.chat
        parts = [sources.fingerprint(self.source), self.settings, self.row_type.__name__, self.max_length]
        parts += [chat.fingerprint(), sorted(chat.stop_ids), _code_hash()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _cached(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenise_rows: Tokeniser[Raw, Row]
    ) -> dict[str, Any]:
        """Return the facts of the cached rows. Tokenise and cache them first if they are missing or damaged."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process tokenises, the others wait for it
            if (facts := _intact_facts(folder)) is None:
                remedy = f"rows are cached there; {store.CACHE_REMEDY}"
                with (
                    store.report_write_errors(folder.parent, remedy),
                    store.new_folder(folder, resume=True) as staging,  # parts that a killed program made are used
                ):
                    facts = self._write(staging, rows, tokenise_rows)
                    (staging / FACTS).write_text(json.dumps(facts), encoding="utf-8")
                _delete_unused(folder.parent)
        return facts

    def _write(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenise_rows: Tokeniser[Raw, Row]
    ) -> dict[str, Any]:
        """Write all parts, and return the facts about them."""
        counts: Counter[str] = Counter()
        source, parts = rows(counts), list[_Part]()
        with self.screen.progress(f"reading {sources.name(self.source)}", None) as progress:

            def report(done: int) -> None:
                progress.show(sum(sum(part.read) for part in parts) + done, {})

            while part := self._write_part(folder / str(len(parts)), source, tokenise_rows, report):
                parts.append(part)
        unread = sources.pop_unread(counts)
        dropped = sum((Counter(part.dropped) for part in parts), counts)
        truncated = dropped.pop(TRUNCATED, 0)
        train, held_out = (sum(part.written[split] for part in parts) for split in range(2))
        if not train:
            read, read_held_out = (sum(part.read[split] for part in parts) for split in range(2))
            raise no_rows_left(self.source, (read, read_held_out), dropped, self.max_length)
        digests = "".join(part.digest for part in parts)
        facts = {
            "source": sources.name(self.source),
            "fingerprint": digests if len(parts) == 1 else hashlib.sha256(digests.encode()).hexdigest(),
            "rows": train,
            "held_out": held_out,
            "dropped": dict(dropped),
            "unread": unread,
            "answers_truncated": truncated,
            "max_length": self.max_length,
        }
        return {"rows": facts, "parts": len(parts)}

    def _write_part(
        self, folder: Path, source: Split[Raw], tokenise_rows: Tokeniser[Raw, Row], report: Callable[[int], None]
    ) -> "_Part | None":
        """Write the next part and return its facts, or None at the end of the source.

        A part that an earlier program completed is reused: its rows are read and skipped.
        """
        if store.is_intact(folder):
            part = _Part(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
            for _ in islice(source, sum(part.read)):
                pass
            report(sum(part.read))
            return part
        first = list(islice(source, BATCH))
        if not first:
            return None
        dropped: Counter[str] = Counter()
        with store.new_folder(folder) as staging:
            splits = [row_files.RowWriter(staging / f"{split}.arrow", self.row_type) for split in SPLITS]
            with splits[0], splits[1]:
                batches = iter(lambda: list(islice(source, BATCH)), [])
                for done, batch in enumerate(chain([first], islice(batches, PART // BATCH - 1)), 1):
                    tokens = tokenise_rows([row for row, _ in batch], self.base.chat, self.max_length, dropped)
                    for split, wanted in zip(splits, (False, True), strict=True):
                        rows = zip(batch, tokens, strict=True)
                        split.add([(row, ids) for (row, held_out), ids in rows if held_out == wanted])
                    report(done * BATCH)
            part = _Part.of(splits, dropped)
            (staging / FACTS).write_text(json.dumps(asdict(part)), encoding="utf-8")
        return part


@dataclass(frozen=True)
class _Part:
    """Facts about consecutive rows of a source: training and held-out counts, and reasons of dropped rows."""

    read: tuple[int, int]
    written: tuple[int, int]
    digest: str
    dropped: Mapping[str, int]

    @classmethod
    def of(cls, splits: Sequence[RowWriter], dropped: Mapping[str, int]) -> "_Part":
        train, held_out = splits
        digest = hashlib.sha256(train.digest.digest() + held_out.digest.digest()).hexdigest()
        return cls((train.read, held_out.read), (train.written, held_out.written), digest, dict(dropped))


def _intact_facts(folder: Path) -> dict[str, Any] | None:
    """Return the facts of cached rows, or None if a file is missing or changed."""
    if not store.is_intact(folder):
        return None
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if not all(store.is_intact(folder / str(number)) for number in range(facts["parts"])):
        return None
    (folder / FACTS).touch()  # the modification time is the time of the last use
    return facts


def _delete_unused(folder: Path) -> None:
    """Delete cached rows, and parts that a killed program left, if they were not used for UNUSED_DAYS."""
    for facts in (*folder.glob(f"*/{FACTS}"), *folder.glob(f".*.staging/0/{FACTS}")):
        if time.time() - facts.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(folder / facts.relative_to(folder).parts[0], ignore_errors=True)


@cache
def _code_hash() -> str:
    """Return a hash of all code of this package, and of plugins. Rows that other code cached are not used."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps([FORMS.code(), RANKERS.code()]).encode())
    return digest.hexdigest()

"""What there is to learn from, as token ids: tokenised once for a source and its settings, and kept on disk.

Rows lie in files that the system maps into memory as they are read, so that a million of them take no more of it than a
thousand. A folder is written whole or not at all, and believed by its hashes.
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

from lora_align import processes, runs
from lora_align.console import Screen, count
from lora_align.data import pairs, ratings, sources
from lora_align.data.forms import FORMS
from lora_align.data.pairs import Split
from lora_align.data.rows import Conversation, Pair, Rated
from lora_align.data.sources import Source
from lora_align.errors import UserError
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.chat_format import ChatFormat
from lora_align.model.tokenise import TRUNCATED, TokenPair, TokenRated, TokenText
from lora_align.rankers import RANKERS
from lora_align.recipe import Preference, Ratings, Sft
from lora_align.train import row_files
from lora_align.train.row_files import LazyRows, RowWriter, concat

AT_ONCE = 256  # rows that are tokenised together
UNUSED_DAYS = 30  # after which kept rows are deleted
PART = 1 << 16  # rows between two parts: what a kill may cost
FACTS, PART_FACTS = "facts.json", "part.json"
SIDES = ("train", "held_out")
Row = TypeVar("Row", TokenPair, TokenRated, TokenText)
Raw = TypeVar("Raw", Pair, Rated, Conversation)


@dataclass(frozen=True)
class TokenRows(Generic[Row]):
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


def read_token_pairs(
    axis: Preference, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> TokenRows[TokenPair]:
    """A preference's pairs."""
    about = {**asdict(axis), "held_out": held_out, "limit": limit}
    read = partial(pairs.read_pairs, axis, held_out, limit)
    return _CachedRows(TokenPair, axis, about, base, max_length, screen).kept(read, tokenise.pairs)


def read_token_ratings(
    table: Ratings, base: Base, held_out: float, limit: int | None, max_length: int, screen: Screen
) -> TokenRows[TokenRated]:
    """Answers that were rated."""
    about = {**asdict(table), "held_out": held_out, "limit": limit}
    read = partial(ratings.read_ratings, table, held_out, limit)
    return _CachedRows(TokenRated, table, about, base, max_length, screen).kept(read, tokenise.rated)


def read_token_texts(table: Sft, base: Base, screen: Screen) -> TokenRows[TokenText]:
    """Conversations to learn the assistant's part of, or all."""
    names = ("data", "split", "revision", "subset", "columns", "skip_bad", "held_out", "limit", "answers_only")
    about = {name: getattr(table, name) for name in names}
    texts = partial(tokenise.texts, answers_only=table.answers_only)
    keeping = _CachedRows(TokenText, table, about, base, table.max_length, screen)
    return keeping.kept(partial(pairs.read_conversations, table), texts)


def report_dropped(what: str, facts: Mapping[str, Any], screen: Screen) -> None:
    """Say what of a source is not learned from, if anything."""
    for warning in sources.unread_warnings(facts["unread"]):
        screen.warn(f"{what}: {warning}")
    lost = [f"dropped: {pairs.reasons(Counter(facts['dropped']))}"] if facts["dropped"] else []
    lost += [f"answers cut: {facts['answers_cut']:,}"] if facts["answers_cut"] else []
    if lost:
        rows = f"{count(facts['rows'], 'row')} to learn from, {facts['held_out']:,} held out"
        screen.note(f"{what}: {rows}; {'; '.join(lost)}")


def no_rows_left(source: Source, read: tuple[int, int], dropped: Counter[str], max_length: int) -> UserError:
    """What is wrong with a source of which nothing is left to train on; `read` are rows to train on and held out."""
    train, held_out = read
    lost = pairs.reasons(dropped)
    if train:
        why = f"{lost}; max_length is {max_length}"
    else:
        aside = f"all {held_out} held out; lower held_out" if held_out else ""
        why = ", ".join(filter(None, (aside, lost))) or "the source is empty"
    return UserError(f"{sources.name(source)}: no rows left ({why})")


def interleave(parts: Sequence[TokenRows[Row]]) -> TokenRows[Row]:
    """Several as one, each spread evenly over the whole; `fingerprint` names all of them."""
    if len(parts) == 1:
        return parts[0]
    facts = [part.facts for part in parts]
    said = {
        "source": " + ".join(fact["source"] for fact in facts),
        "fingerprint": hashlib.sha256("".join(fact["fingerprint"] for fact in facts).encode()).hexdigest(),
        **{name: sum(fact[name] for fact in facts) for name in ("rows", "held_out", "answers_cut")},
        **{name: dict(sum((Counter(fact[name]) for fact in facts), Counter[str]())) for name in ("dropped", "unread")},
        "max_length": facts[0]["max_length"],
    }
    return TokenRows(_spread([part.train for part in parts]), _spread([part.held_out for part in parts]), said)


def _spread(parts: Sequence[Sequence[Row]]) -> LazyRows[Row]:
    rows = concat(parts)
    order = numpy.concatenate([numpy.arange(len(part)) / max(len(part), 1) for part in parts]).argsort(kind="stable")
    return LazyRows(len(rows), lambda i: rows[int(order[i])])


@dataclass(frozen=True)
class _CachedRows(Generic[Row]):
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

    def kept(self, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]) -> TokenRows[Row]:
        """From disk, where they are kept from here on at the latest."""
        folder = runs.cache_folder() / "tokens" / self._key()
        facts = processes.local_rank_0_first(lambda: self._made(folder, rows, tokenising))
        parts = [folder / str(number) for number in range(facts["parts"])]
        train, held_out = (
            concat([row_files.rows(part / f"{side}.arrow", self.shape) for part in parts]) for side in SIDES
        )
        return TokenRows(train, held_out, facts["rows"])

    def _made(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]
    ) -> dict[str, Any]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process tokenises, the others wait for it
            facts = _facts(folder)
            if facts is None:
                staging = folder.with_name(f".{folder.name}.staging")
                shutil.rmtree(folder, ignore_errors=True)
                staging.mkdir(exist_ok=True)  # parts that were made before it was stopped are not made again
                try:
                    with runs.report_write_errors(
                        folder.parent, "rows are kept there; LORA_ALIGN_CACHE moves the cache"
                    ):
                        facts = self._written(staging, rows, tokenising)
                        runs.sync(staging)
                        staging.rename(folder)
                except Exception:
                    shutil.rmtree(staging, ignore_errors=True)  # of what broke off, nothing stays
                    raise
                _sweep(folder.parent)
        return facts

    def _key(self) -> str:
        """Of the rows, what was said about them, what they become, and the program that reads them."""
        chat = self.base.chat
        parts = [sources.fingerprint(self.source), self.about, self.shape.__name__, self.max_length]
        parts += [chat.fingerprint(), sorted(chat.stop_ids), _program()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _written(
        self, folder: Path, rows: Callable[[Counter[str]], Split[Raw]], tokenising: Tokenising[Raw, Row]
    ) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        found, parts = rows(counts), list[_Part]()
        with self.screen.progress(f"reading {sources.name(self.source)}", None) as progress:

            def report(done: int) -> None:
                progress.show(sum(sum(part.read) for part in parts) + done, {})

            while part := self._part(folder / str(len(parts)), found, tokenising, report):
                parts.append(part)
        columns = sources.pop_unread(counts)
        dropped = sum((Counter(part.dropped) for part in parts), counts)
        cut = dropped.pop(TRUNCATED, 0)
        train, held_out = (sum(part.kept[side] for part in parts) for side in range(2))
        if not train:
            read, aside = (sum(part.read[side] for part in parts) for side in range(2))
            raise no_rows_left(self.source, (read, aside), dropped, self.max_length)
        digests = "".join(part.digest for part in parts)
        said = {
            "source": sources.name(self.source),
            "fingerprint": digests if len(parts) == 1 else hashlib.sha256(digests.encode()).hexdigest(),
            "rows": train,
            "held_out": held_out,
            "dropped": dict(dropped),
            "unread": columns,
            "answers_cut": cut,
            "max_length": self.max_length,
        }
        files = {f"{number}/{name}": known for number, part in enumerate(parts) for name, known in part.files.items()}
        facts = {"rows": said, "parts": len(parts), "files": files}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return facts

    def _part(
        self, folder: Path, found: Split[Raw], tokenising: Tokenising[Raw, Row], report: Callable[[int], None]
    ) -> "_Part | None":
        """The next rows, tokenised, or as they were before; None where there are no more."""
        if before := _Part.whole(folder):
            for _ in islice(found, sum(before.read)):
                pass
            report(sum(before.read))
            return before
        first = list(islice(found, AT_ONCE))
        if not first:
            return None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        dropped: Counter[str] = Counter()
        sides = [row_files.RowWriter(folder / f"{side}.arrow", self.shape) for side in SIDES]
        with sides[0], sides[1]:
            chunks = iter(lambda: list(islice(found, AT_ONCE)), [])
            for done, some in enumerate(chain([first], islice(chunks, PART // AT_ONCE - 1)), 1):
                tokens = tokenising([row for row, _ in some], self.base.chat, self.max_length, dropped)
                for side, wanted in zip(sides, (False, True), strict=True):
                    side.add([(row, ids) for (row, aside), ids in zip(some, tokens, strict=True) if aside == wanted])
                report(done * AT_ONCE)
        return _Part.written(folder, sides, dropped)


@dataclass(frozen=True)
class _Part:
    """So many rows in a row of a source, on disk; to train on and held out."""

    read: tuple[int, int]
    kept: tuple[int, int]
    digest: str
    dropped: Mapping[str, int]
    files: Mapping[str, str]

    @classmethod
    def written(cls, folder: Path, sides: Sequence[RowWriter], dropped: Mapping[str, int]) -> "_Part":
        """Whole from here on."""
        train, held_out = sides
        digest = hashlib.sha256(train.digest.digest() + held_out.digest.digest()).hexdigest()
        files = {side.file.name: runs.sha256(side.file) for side in sides}
        part = cls((train.read, held_out.read), (train.kept, held_out.kept), digest, dict(dropped), files)
        runs.sync(folder)
        unfinished = folder / f".{PART_FACTS}"
        unfinished.write_text(json.dumps(asdict(part)), encoding="utf-8")
        unfinished.rename(folder / PART_FACTS)
        return part

    @classmethod
    def whole(cls, folder: Path) -> "_Part | None":
        """As it was written, if it is there and not damaged."""
        try:
            part = cls(**json.loads((folder / PART_FACTS).read_text(encoding="utf-8")))
            return part if all(runs.sha256(folder / name) == of for name, of in part.files.items()) else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None


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
    for last in (*folder.glob(f"*/{FACTS}"), *folder.glob(f".*.staging/0/{PART_FACTS}")):
        if time.time() - last.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(folder / last.relative_to(folder).parts[0], ignore_errors=True)


@cache
def _program() -> str:
    """Return a hash of the code that reads rows. Rows cached by other code are not used."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps([FORMS.code(), RANKERS.code()]).encode())
    return digest.hexdigest()

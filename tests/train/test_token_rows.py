"""Cached token rows: equal to those read, tokenised once, checked by hash, never all in memory."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_align import recipe, store
from lora_align.console import Screen
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.recipe import Preference
from lora_align.train import token_rows
from lora_align.train.row_files import LazyRows, concat
from support import call, fill, pairs_of, small_disk

QUIET = Screen(quiet=True)
HELPFUL = Preference("demo:pairs?rows=60", "label:better_response_id")


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_cached_rows_equal_those_that_were_read(base: Base) -> None:
    read = pairs_of(HELPFUL, 0.2)
    for _ in ("tokenised", "from disk"):
        cached = token_rows.read_token_pairs(HELPFUL, base, 0.2, None, 512, QUIET)
        for rows, raw in ((cached.train, read.train), (cached.held_out, read.held_out)):
            assert [row.shared() for row in rows] == [
                (prompt, answers)
                for prompt, answers in base.chat.answered_each([(r.prompt, (r.chosen, r.rejected)) for r in raw])
            ]
        assert cached.facts["rows"] == len(read.train)
        assert cached.facts["held_out"] == len(read.held_out) > 0


def test_ratings_and_conversations_survive_the_cache(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "rated.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": "A number.", "warmth": i % 5, "other": None} for i in range(7)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    rated = token_rows.read_token_ratings(recipe.Ratings(str(file)), base, 0.0, None, 512, QUIET).train
    assert [row.ratings["warmth"] for row in rated] == [25.0 * (i % 5) for i in range(7)]
    table = recipe.Sft(data="demo:conversations?rows=9", held_out=0.0)
    [answers, texts] = (
        token_rows.read_token_texts(replace(table, answers_only=only), base, QUIET).train for only in (True, False)
    )
    assert [row.ids for row in answers] == [row.ids for row in texts]
    assert all(row.ids == row.labels for row in texts)
    assert all(row.labels[0] == tokenise.IGNORED for row in answers)


def test_rows_are_tokenised_once_per_source_and_settings(base: Base, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"What is {i}?", "chosen": "Five.", "rejected": "No idea."}) for i in range(9)]
    file.write_text("\n".join(lines))

    def made(axis: Preference, limit: int | None = None, max_length: int = 64) -> set[Path]:
        token_rows.read_token_pairs(axis, base, 0.0, limit, max_length, QUIET)
        return set(cache.glob("*/facts.json"))

    axis = Preference(str(file))
    assert len(made(axis)) == len(made(axis)) == 1
    assert len(made(axis, limit=5)) == 2
    assert len(made(axis, max_length=32)) == 3
    assert len(made(replace(axis, rank="shorter"))) == 4
    file.write_text("\n".join(lines[1:]))
    assert len(made(axis)) == 5


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "facts gone", "facts are no facts"])
def test_damaged_cache_is_rebuilt(damage: str, base: Base, cache: Path) -> None:
    whole = [row.shared() for row in token_rows.read_token_pairs(HELPFUL, base, 0.2, None, 512, QUIET).train]
    [folder] = (path for path in cache.iterdir() if path.is_dir())
    rows, facts = folder / "0" / "train.arrow", folder / "facts.json"
    content = bytearray(rows.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-9])
    elif damage == "facts gone":
        facts.unlink()
    else:
        facts.write_text("[]")
    assert [row.shared() for row in token_rows.read_token_pairs(HELPFUL, base, 0.2, None, 512, QUIET).train] == whole


def test_a_failed_read_leaves_nothing_behind(base: Base, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."})
    file.write_text("\n".join([good] * 600 + ["not JSON"]))
    with pytest.raises(UserError, match=r"pairs\.jsonl:601"):
        token_rows.read_token_pairs(Preference(str(file)), base, 0.0, None, 64, QUIET)
    assert not [path for path in cache.iterdir() if path.is_dir()]


SLOWLY = """
import sys
from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base
from lora_align.recipe import Preference
from lora_align.train import token_rows

token_rows.PART = 256
axis = Preference("demo:pairs?rows=1600", "label:better_response_id")
found = token_rows.read_token_pairs(axis, base.find(recipe.Base("demo")), 0.2, None, 512, Screen(quiet=True))
print(found.facts["fingerprint"], len(found.train), len(found.held_out))
"""


def test_a_killed_tokenisation_resumes_from_its_intact_parts(
    base: Base, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen([sys.executable, "-c", SLOWLY], cwd=tmp_path)
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(cache.glob(".*.staging/[0-9]*/facts.json"))) < 3:
        time.sleep(0.001)
    child.kill()
    child.wait(60)
    made = {file.parent.name: file.stat().st_mtime_ns for file in cache.glob(".*.staging/[0-9]*/facts.json")}
    assert len(made) >= 3, "killed too late"
    [damaged] = cache.glob(".*.staging/1/train.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    done = subprocess.run([sys.executable, "-c", SLOWLY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = list(cache.glob("*/[0-9]*/facts.json"))
    assert len(parts) > len(made)
    reused = [file.parent.name for file in parts if made.get(file.parent.name) == file.stat().st_mtime_ns]
    assert sorted(reused) == sorted(set(made) - {"1"})
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path / "another"))
    whole = subprocess.run([sys.executable, "-c", SLOWLY], cwd=tmp_path, capture_output=True, text=True)
    assert whole.stdout == done.stdout
    fresh = {
        file.relative_to(tmp_path / "another"): store.sha256(file)
        for file in tmp_path.glob("another/tokens/*/*/*.arrow")
    }
    assert fresh == {file.relative_to(tmp_path / "cache"): store.sha256(file) for file in cache.glob("*/*/*.arrow")}


def test_unused_cache_folders_are_deleted(base: Base, cache: Path) -> None:
    token_rows.read_token_pairs(HELPFUL, base, 0.2, None, 512, QUIET)
    [facts] = cache.glob("*/facts.json")
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(facts, (month_ago, month_ago))
    token_rows.read_token_pairs(HELPFUL, base, 0.2, None, 256, QUIET)
    [left] = cache.glob("*/facts.json")
    assert left != facts


def test_concatenated_lazy_rows_are_a_sequence() -> None:
    rows = concat([LazyRows(3, lambda i: i), [], [3, 4], LazyRows(2, lambda i: 5 + i)])
    assert list(rows) == list(range(7))
    assert (rows[-1], list(rows[2:5]), list(rows[::-3]), len(rows[1:][2:])) == (6, [2, 3, 4], [6, 3, 0], 4)
    with pytest.raises(IndexError):
        rows[7]


# of this very program: what getrusage tells is at least what the process took that started it
PEAK = """
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

"""
HUNDRED_TIMES = (
    PEAK
    + """
import sys
from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.recipe import Preference
from lora_align.train import token_rows
base = bases.find(recipe.Base("demo"))
found = token_rows.read_token_pairs(Preference(sys.argv[1]), base, 0.0, None, 512, Screen(quiet=True))
tokens = sum(len(row.chosen) for row in found.train)
print(len(found.train), tokens, peak())
"""
)


def test_many_rows_take_no_more_memory_than_few(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 12_000):
        file = tmp_path / f"{count}.jsonl"
        answer = "Yes, and " * 8
        rows = ({"prompt": f"Is it {i}?", "chosen": answer, "rejected": "No."} for i in range(count))
        file.write_text("\n".join(json.dumps(row) for row in rows))
        done = subprocess.run(
            [sys.executable, "-c", HUNDRED_TIMES, str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        read, tokens, kilobytes = map(int, done.stdout.split())
        assert read == count
        assert tokens > 8 * count
        peaks.append(kilobytes / 1024)
    assert peaks[1] - peaks[0] < 40, "megabytes; the rows' own text and ids take twice that"


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["dpo", "--pref", "helpful", "--direction", "pos", "--set", "dpo.limit=240"]
    with small_disk(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("LORA_ALIGN_CACHE", str(disk / "cache"))
        done = call(tmp_path, *words)
        assert done.code == 1
        assert "No space left on device; rows are cached there; LORA_ALIGN_CACHE moves the cache" in done.err
        assert "Traceback" not in done.err
        left = [path for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert [path.parent.name for path in left] == ["templates"], "the verdict on the chat template, which is whole"
    with small_disk(tmp_path / "larger", "8m") as disk:
        monkeypatch.setenv("LORA_ALIGN_CACHE", str(disk / "cache"))
        assert call(tmp_path, *words, "--dry-run").code == 0  # rows are kept
        fill(disk)
        done = call(tmp_path, *words)
        assert done.code == 1
        assert "database or disk is full; values that were stored before are intact" in done.err
        (disk / "filler").unlink()
        assert call(tmp_path, *words).code == 0


MEASURED = (
    PEAK
    + """
import sys
from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base
from lora_align.recipe import Preference
from lora_align.train import token_rows

axis, demo = Preference(sys.argv[1], "label"), base.find(recipe.Base("demo"))
before = peak()
assert len(token_rows.read_token_pairs(axis, demo, 0.0, None, 256, Screen(quiet=True)).train) == 3
print((peak() - before) // 1024)
"""
)


def test_ten_megabyte_rows_are_truncated_or_dropped(base: Base, tmp_path: Path) -> None:
    """In memory that their tokens would not have fitted into; nothing changes for rows beside them."""
    short = {"prompt": "Why?", "chosen": "It is so.", "rejected": "No."}
    long = ["x" * 10_000_000, "some words of it, " * 600_000]
    rows = [short, *({**short, "chosen": text} for text in long), *({**short, "prompt": text} for text in long)]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    program = [sys.executable, "-c", MEASURED, str(file)]  # where nothing was large before
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    read = token_rows.read_token_pairs(Preference(str(file), "label"), base, 0.0, None, 256, QUIET)
    assert (read.facts["rows"], read.facts["answers_truncated"]) == (3, 2)
    assert read.facts["dropped"] == {"prompt too long": 2}
    assert read.train[0].shared() == base.chat.answered([Message("user", "Why?")], ["It is so.", "No."])
    for row, text in zip(list(read.train)[1:], long, strict=True):
        whole = base.chat.answered([Message("user", "Why?")], [text[:4000]])[1][0]
        assert row.chosen == whole[: 256 - len(row.prompt)]
    assert int(done.stdout) < 600, "megabytes; the tokens of one such row take three times that"

"""Batches that are there whole or not at all, whenever the process that writes them is killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_align.data import shards, sources
from lora_align.errors import RunFailedError, UserError
from support import fill, small_disk

ROWS, BATCH = 400, 10
WRITER = """
import sys, time
from pathlib import Path
from lora_align.data import shards
with shards.opened(Path(sys.argv[1])) as store:
    done = store.keys()
    todo = [i for i in range(400) if str(i) not in done]
    for start in range(0, len(todo), 10):
        sys.stdin.readline()  # as often as it is told to, however slow its killer is
        store.append([{"key": str(i), "text": "word " * i, "score": float(i)} for i in todo[start:start + 10]])
        print(start, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_writer_loses_a_batch_at_most_and_repeats_nothing(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    kills = 0
    while True:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None
        assert child.stdout is not None
        batches = draw.randint(1, 15)
        child.stdin.write("\n" * (batches + 1))
        child.stdin.flush()
        said = [line for _, line in zip(range(batches), child.stdout, strict=False)]
        time.sleep(draw.random() * 0.01)
        child.kill()
        child.communicate(timeout=60)
        found = list(shards.Shards(tmp_path).rows())
        assert len(found) >= BATCH * len(said)
        assert len({row["key"] for row in found}) == len(found)
        assert all(row["text"] == "word " * int(row["score"]) for row in found)
        if len(found) == ROWS:
            break
        kills += 1
    assert kills > 1
    assert {row["key"] for row in found} == set(map(str, range(ROWS)))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with shards.opened(tmp_path), pytest.raises(UserError, match="another process"), shards.opened(tmp_path):
        pass


def test_what_was_left_unfinished_is_cleared_away(tmp_path: Path) -> None:
    with shards.opened(tmp_path) as store:
        store.append([{"key": "a"}])
    (tmp_path / "part-000001.unfinished").write_bytes(b"half a fi")
    with shards.opened(tmp_path) as store:
        assert store.keys() == {"a"}
        store.append([{"key": "b"}])
    assert [row["key"] for row in shards.Shards(tmp_path).rows()] == ["a", "b"]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("suffix", shards.SUFFIXES)
def test_rows_of_several_kinds_keep_all_their_columns(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    shards.write([{"prompt": "a", "score:x": 1.0}, {"prompt": "b", "score:x_0": 2.0}], out)
    first, second = (row for _, row in sources.rows(str(out)))
    assert (first["score:x"], second["score:x_0"]) == (1.0, 2.0)


def test_missing_parent_of_an_out_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in ("nowhere", "file"):
        with pytest.raises(
            UserError, match=rf"--out .*{parent}/a\.jsonl: there is no folder .*{parent}; make it first"
        ):
            shards.check_out(tmp_path / parent / "a.jsonl")
    shards.check_out(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", shards.SUFFIXES)
def test_full_disk_is_one_line_with_path_bytes_and_cure(suffix: str, tmp_path: Path) -> None:
    told = r"No space left on device \(\d[\d.]* .B to write, 0 kB free\); make room and say it again"
    rows = [{"key": str(i), "text": f"{i} " * 5000} for i in range(40)]
    with small_disk(tmp_path / "disk", "64k") as disk:
        out = disk / f"out{suffix}"
        with shards.towards(out, {}) as store:
            store.append([{"key": "first"}])
            fill(disk)
            with pytest.raises(RunFailedError, match=rf"^{disk}/\.out{suffix}\.parts: .*{told}"):
                store.append(rows)
        with pytest.raises(RunFailedError, match=rf"^{out}: .*{told}"):
            shards.write(rows, out)
        assert not [file for file in disk.rglob("*unfinished*") if file.name.startswith(".out")]
        assert list(shards.Shards(disk / f".out{suffix}.parts").rows()) == [{"key": "first"}]

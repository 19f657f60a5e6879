"""Shards are complete or absent, whenever the writing process is killed."""

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
        sys.stdin.readline()  # write only as many batches as the test allows
        store.append([{"key": str(i), "text": "word " * i, "score": float(i)} for i in todo[start:start + 10]])
        print(start, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_killed_writer_loses_at_most_one_batch_and_repeats_none(seed: int, tmp_path: Path) -> None:
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
        reported = [line for _, line in zip(range(batches), child.stdout, strict=False)]
        time.sleep(draw.random() * 0.01)
        child.kill()
        child.communicate(timeout=60)
        rows = list(shards.Shards(tmp_path).rows())
        assert len(rows) >= BATCH * len(reported)
        assert len({row["key"] for row in rows}) == len(rows)
        assert all(row["text"] == "word " * int(row["score"]) for row in rows)
        if len(rows) == ROWS:
            break
        kills += 1
    assert kills > 1
    assert {row["key"] for row in rows} == set(map(str, range(ROWS)))


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with shards.opened(tmp_path), pytest.raises(UserError, match="another process"), shards.opened(tmp_path):
        pass


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    with shards.opened(tmp_path) as store:
        store.append([{"key": "a"}])
    (tmp_path / "part-000001.unfinished").write_bytes(b"half a fi")
    with shards.opened(tmp_path) as store:
        assert store.keys() == {"a"}
        store.append([{"key": "b"}])
    assert [row["key"] for row in shards.Shards(tmp_path).rows()] == ["a", "b"]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("suffix", shards.SUFFIXES)
def test_rows_with_different_columns_keep_all_columns(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    shards.write([{"prompt": "a", "score:x": 1.0}, {"prompt": "b", "score:x_0": 2.0}], out)
    first, second = (row for _, row in sources.rows_or_raise(str(out)))
    assert (first["score:x"], second["score:x_0"]) == (1.0, 2.0)


def test_missing_parent_of_an_out_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in ("nowhere", "file"):
        with pytest.raises(
            UserError, match=rf"--out .*{parent}/a\.jsonl: there is no folder .*{parent}; make it first"
        ):
            shards.check_out_file(tmp_path / parent / "a.jsonl")
    shards.check_out_file(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", shards.SUFFIXES)
def test_full_disk_error_has_path_bytes_and_remedy(suffix: str, tmp_path: Path) -> None:
    message = r"No space left on device \(\d[\d.]* .B to write, 0 kB free\); free disk space and run the command again"
    rows = [{"key": str(i), "text": f"{i} " * 5000} for i in range(40)]
    with small_disk(tmp_path / "disk", "64k") as disk:
        out = disk / f"out{suffix}"
        with shards.shards_for(out, {}) as store:
            store.append([{"key": "first"}])
            fill(disk)
            with pytest.raises(RunFailedError, match=rf"^{disk}/\.out{suffix}\.parts: .*{message}"):
                store.append(rows)
        with pytest.raises(RunFailedError, match=rf"^{out}: .*{message}"):
            shards.write(rows, out)
        assert not [file for file in disk.rglob("*unfinished*") if file.name.startswith(".out")]
        assert list(shards.Shards(disk / f".out{suffix}.parts").rows()) == [{"key": "first"}]

"""Datasets on the hub: revision, subset and split."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import read, serving
from support import COMMAND

CARD = b"---\nlicense: mit\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
CARD += b"- config_name: two\n  data_files: two.jsonl\n---\n"


def _rows(count: int) -> bytes:
    rows = ({"prompt": f"Is {i} so?", "chosen": "Yes, it is.", "rejected": "No."} for i in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SETS = {
    "owner/folders": {
        "main": {"data/train.jsonl": _rows(3), "kind/train.jsonl": _rows(4), "kind/test.jsonl": _rows(7)},
        "v1": {"data/train.jsonl": _rows(2), "kind/test.jsonl": _rows(1)},
    },
    "owner/parts": {"main": {"README.md": CARD, "one.jsonl": _rows(5), "two.jsonl": _rows(6)}},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(SETS) as address:
        yield address


ROWS: list[tuple[dict[str, str], int | str]] = [
    ({"data": "owner/folders", "revision": "v1"}, 2),
    ({"data": "owner/folders", "revision": "v1", "subset": "kind", "split": "test"}, 1),
    ({"data": "owner/parts", "subset": "two"}, 6),
    ({"data": "owner/parts"}, "it has several subsets, ['one', 'two']; choose one with `subset` in the recipe's table"),
    ({"data": "owner/parts", "subset": "three"}, "no subset and no folder 'three'"),
    ({"data": "owner/folders", "subset": "kind", "split": "dev"}, 'Unknown split "dev"'),
]


def test_revision_subset_and_split_choose_the_rows(hub: str, tmp_path: Path) -> None:
    for result, (table, expected) in zip(read(hub, tmp_path, *(table for table, _ in ROWS)), ROWS, strict=True):
        assert result == expected if isinstance(expected, int) else expected in str(result), table


def test_fetched_folder_is_read_offline(hub: str, tmp_path: Path) -> None:
    folder = {"data": "owner/folders", "subset": "kind"}
    assert "not in the cache" in str(read(hub, tmp_path, folder, offline=True)[0])
    assert read(hub, tmp_path, folder) == [4]
    assert read(hub, tmp_path, folder, offline=True) == [4]


SHOW = """
from lora_align.commands.push_to_hub import data_lines
for source in ("owner/parts two + pairs.jsonl", "owner/folders", "other/never"):
    print(*data_lines({"source": source, "rows": 9, "dropped": {}}))
"""


def test_cards_have_the_licence_that_was_downloaded_with_a_dataset(hub: str, tmp_path: Path) -> None:
    read(hub, tmp_path, {"data": "owner/parts", "subset": "two"}, {"data": "owner/folders", "subset": "kind"})
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = "https://huggingface.co/datasets"
    assert done.stdout.splitlines() == [
        f"`owner/parts two + pairs.jsonl`, 9 rows; licence: `mit`, see {page}/owner/parts",
        f"`owner/folders`, 9 rows; licence: {page}/owner/folders",
        f"`other/never`, 9 rows; licence: {page}/other/never",
    ]


def test_command_names_the_dataset_and_its_subset(hub: str, tmp_path: Path) -> None:
    line = [str(COMMAND), "data", "--pref", "helpful", "--json"]
    for setting in ("data=owner/folders", "subset=kind", "rank=label", "margin=0"):
        line += ["--set", f"preferences.helpful.{setting}"]
    home = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["source"], report["read"]) == ("owner/folders kind", 4)

"""Data sets on a hub: which commit of them, and which part."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub import serving
from support import COMMAND

CARD = b"---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
Data = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture
def data(hub: str, tmp_path: Path) -> Data:
    def asked(*, offline: bool = False, **settings: str) -> "subprocess.CompletedProcess[str]":
        words = [word for name, value in settings.items() for word in ("--set", f"preferences.helpful.{name}={value}")]
        home = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(tmp_path / ".cache" / "hf")}
        line = [str(COMMAND), "data", "--pref", "helpful", "--json", "--set", "preferences.helpful.rank=label"]
        line += ["--set", "preferences.helpful.margin=0", *words]
        return subprocess.run(
            line, cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True, timeout=120
        )

    return asked


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"data": "owner/folders", "revision": "v1"}, 2),
        ({"data": "owner/folders", "revision": "v1", "subset": "kind", "split": "test"}, 1),
        ({"data": "owner/parts", "subset": "two"}, 6),
    ],
)
def test_what_is_named_is_read(settings: dict[str, str], rows: int, data: Data) -> None:
    done = data(**settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["read"] == rows


def test_a_folder_that_was_fetched_is_read_with_no_network(data: Data) -> None:
    there = {"data": "owner/folders", "subset": "kind"}
    assert "not in the cache" in data(offline=True, **there).stderr
    assert json.loads(data(**there).stdout)["source"] == "owner/folders kind"
    again = data(offline=True, **there)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["read"] == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"data": "owner/parts"},
            "it has several subsets, ['one', 'two']; `subset` in the recipe's table names one",
        ),
        ({"data": "owner/parts", "subset": "three"}, "no subset and no folder 'three'"),
        ({"data": "owner/folders", "subset": "kind", "split": "dev"}, 'Unknown split "dev"'),
    ],
)
def test_what_is_not_there_is_told(settings: dict[str, str], told: str, data: Data) -> None:
    done = data(**settings)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr

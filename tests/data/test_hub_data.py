"""Datasets on the hub: revision, subset and split."""

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of the hub that the tests share."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def data(hub: str, home: Path, tmp_path: Path) -> Data:
    def run_data(*, offline: bool = False, cache: Path = home, **settings: str) -> "subprocess.CompletedProcess[str]":
        words = [word for name, value in settings.items() for word in ("--set", f"preferences.helpful.{name}={value}")]
        hub_settings = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(cache)}
        line = [str(COMMAND), "data", "--pref", "helpful", "--json", "--set", "preferences.helpful.rank=label"]
        line += ["--set", "preferences.helpful.margin=0", *words]
        return subprocess.run(
            line, cwd=tmp_path, env={**os.environ, **hub_settings}, capture_output=True, text=True, timeout=120
        )

    return run_data


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"data": "owner/folders", "revision": "v1"}, 2),
        ({"data": "owner/folders", "revision": "v1", "subset": "kind", "split": "test"}, 1),
        ({"data": "owner/parts", "subset": "two"}, 6),
    ],
)
def test_revision_subset_and_split_choose_the_rows(settings: dict[str, str], rows: int, data: Data) -> None:
    done = data(**settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["read"] == rows


def test_fetched_folder_is_read_offline(data: Data, tmp_path: Path) -> None:
    folder = {"data": "owner/folders", "subset": "kind", "cache": tmp_path / "empty"}
    assert "not in the cache" in data(offline=True, **folder).stderr
    assert json.loads(data(**folder).stdout)["source"] == "owner/folders kind"
    again = data(offline=True, **folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["read"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data": "owner/parts"},
            "it has several subsets, ['one', 'two']; choose one with `subset` in the recipe's table",
        ),
        ({"data": "owner/parts", "subset": "three"}, "no subset and no folder 'three'"),
        ({"data": "owner/folders", "subset": "kind", "split": "dev"}, 'Unknown split "dev"'),
    ],
)
def test_missing_subset_or_split_is_an_error(settings: dict[str, str], message: str, data: Data) -> None:
    done = data(**settings)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr

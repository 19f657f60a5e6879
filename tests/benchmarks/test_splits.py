"""Test that splits separate prompts, and that no benchmark reads test rows."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

FOLDER = Path(__file__).parent
SPLITTERS = ("splits.py", "test_splits.py")


@pytest.fixture(scope="module")
def splits() -> Iterator[ModuleType]:
    with mock.patch("sys.path", [str(FOLDER), *sys.path]):
        yield importlib.import_module("splits")


def _data(folder: Path) -> Path:
    """Write data in which every second row repeats a prompt with other answers."""
    lines = {
        "hh-harmless/pairs.jsonl": [
            {"chosen": f"\n\nHuman: Question {row // 2}\n\nAssistant: {row}", "rejected": "no"} for row in range(200)
        ],
        "ultrafeedback/pairs.jsonl": [{"prompt": f"Question {row // 2}", "chosen": f"{row}"} for row in range(200)],
    }
    tables = {
        "xstest/prompts.csv": ["prompt,focus", *(f"Prompt {row},focus {row // 2}" for row in range(200))],
        "refusals/advbench_harmful_behaviors.csv": ["goal", *(f"Goal {row // 2}" for row in range(200))],
    }
    for name, text in {
        **{name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in lines.items()},
        **{name: "\n".join(rows) + "\n" for name, rows in tables.items()},
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    return folder


def test_rows_of_one_prompt_share_a_split(splits: ModuleType, tmp_path: Path) -> None:
    counts = splits.write(_data(tmp_path / "data"), tmp_path / "out")
    for source, (_, group) in splits.SOURCES.items():
        groups = {
            name: {group(row) for row in splits.read(tmp_path / "out" / f"{source}-{name}.jsonl")}
            for name in splits.SPLITS
        }
        assert sum(counts[source].values()) == 200
        assert sum(map(len, groups.values())) == 100, "a group is in two splits"
        assert all(groups.values())


def test_test_rows_are_refused(splits: ModuleType, tmp_path: Path) -> None:
    assert splits.file_of(tmp_path, "xstest", "train") == tmp_path / "xstest-train.jsonl"
    with pytest.raises(ValueError, match="only the published evidence reads this split"):
        splits.file_of(tmp_path, "xstest", "test")


def test_benchmarks_find_split_rows_through_file_of() -> None:
    """A benchmark that takes a folder of splits must not build names of files itself."""
    sources = {file.name: file.read_text() for file in FOLDER.glob("*.py") if file.name not in SPLITTERS}
    readers = [name for name, source in sources.items() if '"--splits"' in source]
    assert len(readers) >= 5
    ways = ("splits.file_of(", "real_base.project(")  # the second uses the first
    assert [name for name in readers if not any(way in sources[name] for way in ways)] == []
    for split in ("train", "development", "test"):
        assert [name for name, source in sources.items() if f"-{split}.jsonl" in source] == []

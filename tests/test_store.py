"""Crash-safe files and folders."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_align import store
from lora_align.errors import RunFailedError, UserError


def test_new_file_replaces_the_old_one_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        with store.new_file(target) as unfinished:
            unfinished.write_text(text)
            assert not target.exists() or target.read_text() != text
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(OSError, match="No such file"), store.new_file(target) as unfinished:
        unfinished.joinpath("no folder").write_text("new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with store.new_folder(target) as staging:
        (staging / "a").write_text("1")
    with pytest.raises(OSError, match="No such file"), store.new_folder(target) as staging:
        (staging / "no folder" / "b").write_text("2")
    assert store.is_intact(target)
    assert sorted(os.listdir(target)) == ["a", store.DIGESTS]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no digests", "not JSON"])
def test_damaged_file_names_the_file(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert store.damaged_file(folder) == store.DIGESTS
    with store.new_folder(folder) as staging:
        (staging / "a").write_text("1")
        (staging / "b").write_text("22")
    assert store.damaged_file(folder) is None
    file, digests = folder / "b", folder / store.DIGESTS
    if damage == "changed":
        file.write_text("23")
    elif damage == "cut":
        file.write_text("2")
    elif damage == "gone":
        file.unlink()
    elif damage == "no digests":
        digests.unlink()
    else:
        digests.write_text("[]")
    assert store.damaged_file(folder) == (store.DIGESTS if damage in ("no digests", "not JSON") else "b")


@pytest.mark.parametrize("resume", [False, True])
def test_a_killed_folder_is_emptied_or_resumed(resume: bool, tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from lora_align import store
with store.new_folder(Path({str(tmp_path / "folder")!r})) as staging:
    (staging / "part").write_text("done")
    print("ready", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert not (tmp_path / "folder").exists()
    with store.new_folder(tmp_path / "folder", resume=resume) as staging:
        assert (staging / "part").exists() == resume
    assert store.is_intact(tmp_path / "folder")


def test_a_folder_that_was_sealed_but_not_renamed_is_resumed(tmp_path: Path) -> None:
    staging = tmp_path / ".folder.staging"
    staging.mkdir()
    (staging / store.DIGESTS).write_text("{}")
    with store.new_folder(tmp_path / "folder", resume=True) as folder:
        (folder / "part").write_text("done")
    assert store.is_intact(tmp_path / "folder")


def test_exported_folder_keeps_a_target_that_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def export() -> None:
        with store.exported_folder(target) as staging:
            (staging / "a").write_text("mine")
            target.mkdir()
            (target / "a").write_text("theirs")

    with pytest.raises(RunFailedError, match="was made by another program"):
        export()
    assert (target / "a").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["folder"]


def test_new_file_keeps_a_target_that_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "file"

    def export() -> None:
        with store.new_file(target, replace=False) as temporary:
            temporary.write_text("mine")
            target.write_text("theirs")

    with pytest.raises(RunFailedError, match="was made by another program"):
        export()
    assert target.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["file"]


def test_signal_leaves_nothing_of_an_exported_folder(tmp_path: Path) -> None:
    def export() -> None:
        with store.exported_folder(tmp_path / "folder") as staging:
            (staging / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export()
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"about .* MB will be written, .* are free; elsewhere"):
        store.check_free_space(tmp_path / "not" / "there", 10**18, "elsewhere")


def test_write_errors_name_folder_cause_and_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFailedError, match=r"No space left on device \(2 kB to write, .* free\); make room"),
        store.report_write_errors(tmp_path, "make room", 2000),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(RunFailedError, match="No such file or directory; write elsewhere"),
        store.report_write_errors(tmp_path, "make room", 2000),
    ):
        (tmp_path / "no" / "file").write_text("x")


def test_only_numpy_reports_a_full_disk_without_a_number(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="make room"), store.report_write_errors(tmp_path, "make room"):
        raise OSError("64 requested and 0 written")  # as numpy.ndarray.tofile
    with pytest.raises(OSError, match="no such model"), store.report_write_errors(tmp_path, "make room"):
        raise OSError("no such model")  # as transformers


def test_windows_syncs_files_but_opens_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open

    def as_on_windows(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(path)
        assert flags & os.O_RDWR, "Windows syncs only what may be written"
        return open_(path, flags)

    monkeypatch.setattr(os, "open", as_on_windows)
    monkeypatch.setattr(store, "WINDOWS", True)
    with store.new_folder(tmp_path / "folder") as staging:
        (staging / "file").write_text("text")
    assert store.is_intact(tmp_path / "folder")

"""A run is published completely or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lora_align import run_writer, runs
from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError
from lora_align.runs import Manifest
from support import COMMAND, edit_manifest, fill, small_disk

BASE = {"model": "demo", "fingerprint": "f" * 64}


def _publish(target: Path, *, force: bool = False, text: str = "weights") -> runs.Run:
    with run_writer.staging_folder(target, Screen(quiet=True), force=force) as staging:
        (staging / "adapter.bin").write_text(text)
        return run_writer.publish(staging, target, Manifest(stage="dpo", base=BASE))


def test_published_run_reads_back(tmp_path: Path) -> None:
    made = _publish(tmp_path / "dpo" / "a" / "pos")
    stored = runs.read(tmp_path / "dpo" / "a" / "pos")
    assert stored.manifest == made.manifest
    assert set(stored.manifest.files) == {"adapter.bin"}
    stored.check_files()
    assert [run.path for run in runs.list_runs(tmp_path)] == [made.path]


def test_check_files_detects_truncation_and_flipped_bits(tmp_path: Path) -> None:
    run = _publish(tmp_path / "a", text="0123456789abcdef")
    file = run.path / "adapter.bin"
    whole = file.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [
        bytes(b ^ (1 << bit) if i == n else b for i, b in enumerate(whole)) for n in range(16) for bit in range(8)
    ]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter\.bin"):
            run.check_files()
    file.write_bytes(whole)
    run.check_files()
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        run.check_files()


def test_existing_run_is_refused_or_moved_aside(tmp_path: Path) -> None:
    _publish(tmp_path / "a", text="old")
    with pytest.raises(UserError, match=r"another name or folder keeps both, --force"):
        _publish(tmp_path / "a")
    _publish(tmp_path / "a", force=True, text="new")
    contents = sorted(file.read_text() for file in tmp_path.glob("a*/adapter.bin"))
    assert contents == ["new", "old"]
    assert len(runs.list_runs(tmp_path)) == 1


def test_failure_leaves_no_run(tmp_path: Path) -> None:
    def fail() -> None:
        with run_writer.staging_folder(tmp_path / "a", Screen(quiet=True)) as staging:
            (staging / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert runs.list_runs(tmp_path) == []
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".a.staging"))


def _spawn(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    program = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from lora_align import run_writer, runs
        from lora_align.console import Screen
        from lora_align.errors import RunFailedError, UserError
        target = Path({str(tmp_path / "a")!r})
        """
    ) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_no_run_and_the_next_takes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = _spawn(
        tmp_path,
        """
        with run_writer.staging_folder(target, Screen()) as staging:
            (staging / "adapter.bin").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        """,
    )
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        _publish(tmp_path / "a")
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    assert runs.list_runs(tmp_path) == []
    with run_writer.staging_folder(tmp_path / "a", Screen()) as staging:
        assert list(staging.iterdir()) == []
    assert f"process {child.pid}" in capsys.readouterr().err


def test_one_of_many_racing_processes_publishes(tmp_path: Path) -> None:
    start = time.time() + 1.5
    children = [
        _spawn(
            tmp_path,
            f"""
            time.sleep(max(0, {start} - time.time()))
            try:
                with run_writer.staging_folder(target, Screen(quiet=True)) as staging:
                    (staging / "adapter.bin").write_text("x")
                    run_writer.publish(staging, target, runs.Manifest(stage="dpo", base={{"fingerprint": "f"}}))
                print("won")
            except UserError:
                print("refused")
            """,
        )
        for _ in range(12)
    ]
    outcomes = [child.communicate(timeout=60)[0].strip() for child in children]
    assert outcomes.count("won") == 1
    assert outcomes.count("refused") == 11


def test_damaged_manifests_and_other_schemas_are_refused(tmp_path: Path) -> None:
    run = _publish(tmp_path / "a")
    manifest = run.path / runs.MANIFEST
    whole = manifest.read_text()
    for content in (
        "",
        "{",
        "[]",
        "{}",
        whole.replace('"schema": 1', '"schema": 99'),
        whole.replace('"stage"', '"stagy"'),
    ):
        manifest.write_text(content)
        with pytest.raises(UserError, match="a"):
            runs.read(run.path)
    manifest.write_text(whole)
    assert runs.read(run.path) == run


@pytest.mark.parametrize(
    "changed",
    [
        {"created": 5},
        {"parents": 3},
        {"parents": [7]},
        {"parents": [{"name": "a", "weight": "1", "adapters": []}]},
        {"base": []},
        {"base": {"model": "demo", "fingerprint": None}},
        {"metrics": []},
        {"metrics": {"held_out": {"pairs": "many", "accuracy": 1.0}}},
        {"metrics": {"held_out": {"pairs": 100, "accuracy": "x"}}},
        {"metrics": {"points": "x"}},
        {"metrics": {"norm": "x"}},
        {"method": {"vectors": 5}},
        {"method": {"axes": 5}},
        {"files": {"adapter.bin": 3}},
        {"files": {"adapter.bin": {"bytes": "8", "sha256": "f"}}},
        {"contains_start": "no"},
        {"unconverged": 1},
    ],
)
def test_manifest_with_wrong_types_is_skipped(
    changed: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = _publish(tmp_path / "good"), _publish(tmp_path / "bad")
    edit_manifest(bad.path, **changed)
    assert runs.list_runs(tmp_path, Screen()) == [good]
    assert "skipped" in capsys.readouterr().err


def test_manifest_that_is_not_an_object_or_file_is_skipped(tmp_path: Path) -> None:
    good = _publish(tmp_path / "good")
    for name, content in {"list": "[]", "deep": "[" * 100_000, "latin": "\xff", "number": "1" * 5000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / runs.MANIFEST).write_text(content, encoding="latin-1")
    (tmp_path / "folder" / runs.MANIFEST).mkdir(parents=True)
    assert runs.list_runs(tmp_path) == [good]
    with pytest.raises(UserError, match=r"folder.manifest\.json: damaged"):
        runs.read(tmp_path / "folder")


def test_flipped_bit_in_a_manifest_is_detected(tmp_path: Path) -> None:
    run = _publish(tmp_path / "a")
    file = run.path / runs.MANIFEST
    whole, content = file.read_bytes(), json.loads(file.read_text())
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(UserError, match="a"):
            runs.read(run.path)
    file.write_text(json.dumps(content))  # same content in another layout
    assert runs.read(run.path) == run
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "digest"}))
    with pytest.raises(UserError, match="changed since publication"):
        runs.read(run.path)


def test_publication_order_survives_a_clock_set_back(tmp_path: Path) -> None:
    first = _publish(tmp_path / "dpo" / "a" / "pos")
    later = {"created": "2099-01-01T00:00:00.000000+00:00", "order": 4_070_908_800_000_000}
    edit_manifest(first.path, **later)
    second = _publish(tmp_path / "dpo" / "b" / "pos")
    assert [run.path for run in runs.list_runs(tmp_path)] == [first.path, second.path]


def test_runs_of_another_base_are_refused(tmp_path: Path) -> None:
    _publish(tmp_path / "a")
    runs.check_base(tmp_path, BASE)
    with pytest.raises(UserError, match="--runs DIR"):
        runs.check_base(tmp_path, {"model": "other", "fingerprint": "0" * 64})


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        _publish(tmp_path / "file" / "a")


def test_published_files_are_readable_by_other_users(tmp_path: Path) -> None:
    with run_writer.staging_folder(tmp_path / "a", Screen(quiet=True)) as staging:
        (staging / "secretive").write_text("x")
        (staging / "secretive").chmod(0o600)
        run = run_writer.publish(staging, tmp_path / "a", Manifest(stage="dpo", base=BASE))
    modes = {file.stat().st_mode for file in run.path.iterdir()}
    assert len(modes) == 1
    assert json.loads((run.path / runs.MANIFEST).read_text())["versions"]["torch"]


def test_full_disk_publishes_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        before = _publish(disk / "a")

        def publish_again() -> None:
            with run_writer.staging_folder(disk / "a", Screen(quiet=True), force=True) as staging:
                (staging / "adapter.bin").write_text("weights")
                fill(disk)
                run_writer.publish(staging, disk / "a", Manifest(stage="dpo", base=BASE))

        with pytest.raises(
            RunFailedError, match=r"No space left on device( \(.* to write, .* free\))?; nothing was published"
        ):
            publish_again()
        before.check_files()
        assert {path.name for path in disk.iterdir() if not path.name.startswith(".")} == {"a", "filler"}


def test_list_refuses_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("nowhere", "file"):
        done = subprocess.run([COMMAND, "list", "--runs", folder], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (
            2,
            f"error: --runs {folder}: there is no such folder; check the path\n",
        )
    done = subprocess.run([COMMAND, "list"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "no runs in runs/ yet\n")

"""Lock, write and publish a run, completely or not at all."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lora_align import distributed, store
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.runs import LOG, MANIFEST, Manifest, Run, digest, is_run, library_versions, list_runs

if TYPE_CHECKING:
    from filelock import FileLock

REMEDY = "nothing was published, and an earlier run is unchanged; correct the cause, such as a full disk, and try again"


def refuse_existing(target: Path, force: bool, remedy: str = "--name NEW keeps both") -> None:
    """Refuse a target that exists, unless `force`. Call this before slow work."""
    if target.exists() and not force:
        raise UserError(f"{target} exists; {remedy}, --force moves the old one aside")


def refuse_before_training(target: Path, *, force: bool, resume: bool, remedy: str = "--name NEW keeps both") -> None:
    """Refuse a target that is being written. Refuse one that exists, unless `force` is set or `resume` continues it."""
    refuse_busy(target)
    if not (resume and is_run(target)):
        refuse_existing(target, force, remedy)


def refuse_busy(target: Path) -> None:
    """Refuse a target that another process is writing."""
    if (target.parent / f".{target.name}.lock").exists():
        distributed.on_rank_0(lambda: _lock(target).release())


@contextmanager
def staging_folder(target: Path, screen: Screen, *, force: bool = False) -> Iterator[Path]:
    """Lock a target and yield an empty staging folder beside it, which `publish` turns into the run.

    Only rank 0 locks. The other ranks get temporary folders, whose contents are discarded.
    """
    locks: list[FileLock] = []
    distributed.on_rank_0(lambda: locks.append(_lock_unless_exists(target, force)))
    if not locks:
        with TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    holder, staging = target.parent / f".{target.name}.holder", target.parent / f".{target.name}.staging"
    try:
        if holder.exists():
            screen.note(f"took over {target} from {_holder(target)}, which stopped before it finished")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
    except Exception:  # not KeyboardInterrupt or Stopped: a stopped run leaves no failure log
        _keep_log(staging, target, screen)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        holder.unlink(missing_ok=True)
        locks[0].release()


def _lock_unless_exists(target: Path, force: bool) -> "FileLock":
    lock = _lock(target)
    try:
        refuse_existing(target, force, "another name or folder keeps both")
    except UserError:
        lock.release()
        raise
    return lock


def _lock(target: Path) -> "FileLock":
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{target} is being written by {_holder(target)}; wait until it ends, or write to another folder"
        ) from None
    except OSError as fault:
        raise UserError(f"cannot write {target.parent}: {fault.strerror}; choose another folder") from fault
    return lock


def publish(staging: Path, target: Path, manifest: Manifest) -> Run:
    """Add the manifest to a staging folder, sync it to disk, and rename it to the target."""

    def publish_and_report() -> Run:
        with store.report_write_errors(target, REMEDY):
            return _publish(staging, target, manifest)

    return distributed.on_rank_0(publish_and_report)


def _publish(staging: Path, target: Path, manifest: Manifest) -> Run:
    files = {
        file.relative_to(staging).as_posix(): {"bytes": file.stat().st_size, "sha256": store.sha256(file)}
        for file in sorted(staging.rglob("*"))
        if file.is_file() and file.name != LOG
    }
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    order = _next_order(target, manifest.stage)
    manifest = replace(manifest, files=files, versions=library_versions(), created=created, order=order)
    manifest = replace(manifest, digest=digest(asdict(manifest)))
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False)
    with store.report_write_errors(target, REMEDY, len(text)):
        (staging / MANIFEST).write_text(text, encoding="utf-8")
    for name in files:
        shutil.copymode(staging / MANIFEST, staging / name)  # safetensors writes files that only the owner can read
    store.sync_tree(staging)
    if target.exists():
        aside = target.with_name(f"{target.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
        target.rename(aside)
    staging.rename(target)
    store.sync(target.parent)
    return Run(target, manifest)


def _next_order(target: Path, stage: str) -> int:
    """Return the time in microseconds, but at least one more than the order of any run in the same runs folder."""
    above = [folder.parent for folder in (target, *target.parents[:2]) if folder.name == stage]
    newest = max((run.manifest.order for folder in above for run in list_runs(folder)), default=0)
    return max(time.time_ns() // 1000, newest + 1)


def _keep_log(staging: Path, target: Path, screen: Screen) -> None:
    """Move the libraries' log of a failed run out of the staging folder."""
    log = staging / LOG
    if log.is_file() and log.stat().st_size:
        failed_log = target.with_name(f"{target.name}.failed-log.txt")
        log.replace(failed_log)
        screen.note(f"the libraries' log messages are in {failed_log}")


def _holder(target: Path) -> str:
    holder = target.parent / f".{target.name}.holder"
    return holder.read_text() if holder.exists() else "another process"

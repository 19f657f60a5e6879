"""Crash-safe files and folders: written under a temporary name, synced to disk, then renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_align.errors import RunFailedError, UserError, first_line

WINDOWS = os.name == "nt"
UNFINISHED = ".unfinished"  # suffix of a file's temporary name
CACHE_REMEDY = "LORA_ALIGN_CACHE moves the cache"
HASH_ONCE_FROM = 1 << 26  # bytes; the hash of a smaller file is not cached
_FULL_BY_NUMPY = re.compile(r"\d+ requested and \d+ written")  # the message of a short write, without a number
DIGESTS = "files.json"  # the sha256 of every other file of a sealed folder


@contextmanager
def new_file(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `target`. When the block ends, sync the file and rename it to `target`.

    Without `replace`, a target that another program made meanwhile is kept.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        if not replace:
            _refuse_target(target)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a staging folder beside `target`. When the block ends, seal the folder and rename it to `target`.

    An exception deletes the staging folder; a signal does not. With `resume`, the contents of a staging
    folder that a killed program left are kept.
    """
    staging = target.with_name(f".{target.name}.staging")
    if not resume:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        seal(staging, target)
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def exported_folder(target: Path) -> Iterator[Path]:
    """Yield a staging folder of this process beside `target`, which must not exist. When the block ends, rename it.

    An exception or a signal deletes the staging folder. A target that another program made meanwhile is kept.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
    staging.mkdir(parents=True)
    try:
        yield staging
        sync_tree(staging)
        _refuse_target(target)
        staging.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _refuse_target(target: Path) -> None:
    if target.exists():
        raise RunFailedError(f"{target} was made by another program meanwhile; give another path")


def fill_once(folder: Path, what: str, fill: Callable[[Path], None]) -> None:
    """Make a cache folder with `fill`, unless the folder exists. `fill` gets the staging folder.

    One process makes it, the others wait. `what` names its contents in the error for a full disk.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        try:
            with new_folder(folder) as staging:
                fill(staging)
        except (OSError, SafetensorError) as fault:
            why = f"{what} could not be cached ({first_line(fault)})"
            raise RunFailedError(f"{folder.parent}: {why}; {CACHE_REMEDY}") from fault


def seal(staging: Path, target: Path) -> None:
    """Write the sha256 of a folder's files into the folder, sync it, and rename it to `target`, which is replaced."""
    files = {file.name: sha256(file) for file in sorted(staging.iterdir()) if file.is_file() and file.name != DIGESTS}
    (staging / DIGESTS).write_text(json.dumps(files), encoding="utf-8")
    sync_tree(staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    sync(target.parent)


def damaged_file(folder: Path) -> str | None:
    """Return the name of a file of a sealed folder that is missing or changed, or None if the folder is intact."""
    try:
        files = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return next((name for name, known in files.items() if sha256(folder / name) != known), None)
    except (OSError, ValueError, AttributeError) as fault:
        return Path(getattr(fault, "filename", None) or DIGESTS).name


def is_intact(folder: Path) -> bool:
    """Return whether every file of a sealed folder is there and unchanged."""
    return damaged_file(folder) is None


def sha256(file: Path) -> str:
    """Return the sha256 of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(file: Path) -> str:
    """Return a file's sha256. The hash of a large file is cached under its path, size and modification time."""
    real = file.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name  # the hub's cache names a blob by its sha256
    status = real.stat()
    if status.st_size < HASH_ONCE_FROM:
        return sha256(real)
    key = hashlib.sha256(f"{real}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()
    known = cache_folder() / "hashes" / key
    if not known.is_file():
        with new_file(known) as fresh:
            fresh.write_text(sha256(real))
    return known.read_text()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk with fsync. Windows writes entries by itself."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def report_write_errors(folder: Path, remedy: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a RunFailedError that names the path, the bytes `needed` if given, and the remedy.

    The remedy is that of a full disk; other errors get another one.
    """
    try:
        yield
    except OSError as fault:
        if fault.errno is None and not _FULL_BY_NUMPY.search(str(fault)):
            raise  # a library's own error, not the disk's
        if fault.errno not in (None, errno.ENOSPC, errno.EDQUOT):
            raise RunFailedError(f"{folder}: {fault.strerror}; write elsewhere") from fault
        why = first_line(fault) if fault.strerror is None else fault.strerror
        bytes_ = f" ({_size(needed)} to write, {_size(_free(folder))} free)" if needed else ""
        raise RunFailedError(f"{folder}: {why}{bytes_}; {remedy}") from fault


def check_free_space(folder: Path, needed: int, remedy: str) -> None:
    """Refuse to begin if the disk has less than `needed` bytes free."""
    if (free := _free(folder)) < needed:
        raise UserError(f"{folder}: about {_size(needed)} will be written, {_size(free)} are free; {remedy}")


def refuse_missing_parent(out: Path, option: str = "--out") -> None:
    """Refuse the path of an option if its folder does not exist. Call this before slow work."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.parent}; make it first (mkdir -p), or choose another")


def cache_folder() -> Path:
    """Return the cache folder; LORA_ALIGN_CACHE sets it."""
    if chosen := os.environ.get("LORA_ALIGN_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("lora-align"))


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"

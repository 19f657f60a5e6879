"""Finished stages on disk. A run is published whole or not at all, and readers believe only its manifest."""

import hashlib
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast, get_origin

from lora_align import __version__, processes
from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.weights import NAME

if TYPE_CHECKING:
    from filelock import FileLock

SCHEMA = 1
DEFAULT = Path("runs")
MANIFEST = "manifest.json"
LOG = "log.txt"
TRAINING = ("sft", "dpo", "reward", "rsf")  # stages that make adapters


def command(words: str, folder: Path) -> str:
    """A command as a person types it who keeps runs in that folder."""
    return f"lora-align {words}" + (f" --runs {shlex.quote(str(folder))}" if folder != DEFAULT else "")


@dataclass(frozen=True)
class Manifest:
    """What a run is, where it comes from, and the size and sha256 of every file it consists of."""

    stage: str
    base: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    preference: str = ""
    direction: str = ""
    contains_start: bool = False
    start: str = ""
    initial_adapter: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    parents: tuple[Mapping[str, Any], ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    unconverged: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    order: int = 0  # of publication: larger than that of every run published before, whatever the clock says
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA
    digest: str = ""  # sha256 of all the above; a manifest of an older version has none


@dataclass(frozen=True)
class Run:
    """A published folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """The base it was made on."""
        return str(self.manifest.base["fingerprint"])

    def check_files(self) -> None:
        """Refuse a run any file of which is not the one that was published."""
        for name, known in self.manifest.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else -1
            if size != known["bytes"]:
                found = "is missing" if size < 0 else f"has {size:,} bytes"
                raise UserError(f"{file}: {found}, the manifest says {known['bytes']:,}; train or merge it again")
            if sha256(file) != known["sha256"]:
                raise UserError(
                    f"{file}: its sha256 is not the manifest's: the file was changed; train or merge it again"
                )


def read(path: Path) -> Run:
    """Return the run in a folder, or refuse a manifest that is damaged or not ours."""
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise UserError(f"{path}: manifest schema {data.get('schema')!r}; this version reads {SCHEMA}")
        data["parents"], data["unconverged"] = tuple(data["parents"]), tuple(data["unconverged"])
        manifest = Manifest(**data)
        _check_types(manifest)
        if manifest.digest and manifest.digest != _digest(manifest):
            raise ValueError("its sha256 is not the one it was published with")
    except FileNotFoundError:
        raise UserError(f"no run in {path}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        why = "it lacks " + str(fault) if isinstance(fault, KeyError) else first_line(fault)
        raise UserError(f"{path / MANIFEST}: damaged ({why}); make the run again") from fault
    return Run(path, manifest)


def _check_types(manifest: Manifest) -> None:
    """Raise where a value is of another type than every reader relies on."""
    for known in fields(manifest):
        value = getattr(manifest, known.name)
        if not isinstance(value, cast(type, get_origin(known.type) or known.type)):
            raise TypeError(f"{known.name} is of type {type(value).__name__}")
    texts = [*manifest.unconverged, manifest.base["model"], manifest.base["fingerprint"]]
    texts += [file["sha256"] for file in manifest.files.values()] + [of["name"] for of in manifest.parents]
    numbers = [file["bytes"] for file in manifest.files.values()] + [of["weight"] for of in manifest.parents]
    if not isinstance(held_out := manifest.metrics.get("held_out", {}), Mapping):
        raise TypeError(f"metrics.held_out is of type {type(held_out).__name__}")
    if manifest.stage == "mix":
        texts.append(manifest.method["name"])
        numbers += [manifest.method["rank"], manifest.metrics["left_out"]]
    wrong = [value for value in texts if not isinstance(value, str)]
    wrong += [value for value in numbers if not isinstance(value, int | float)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is of type {type(wrong[0]).__name__}")


def _digest(manifest: Manifest) -> str:
    """Name what a manifest says, in whatever layout."""
    said = json.loads(json.dumps(asdict(replace(manifest, digest=""))))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def is_run(path: Path) -> bool:
    """A folder is a run when its manifest stands in it."""
    return (path / MANIFEST).is_file()


def every(folder: Path, screen: Screen | None = None) -> list[Run]:
    """All runs below a folder, in order of publication; one with a damaged manifest is passed over, and `screen` told.

    What was moved aside or is unfinished is not among them.
    """
    found = []
    for manifest in folder.rglob(MANIFEST):
        if all(NAME.fullmatch(part) for part in manifest.parent.relative_to(folder).parts):
            try:
                found.append(read(manifest.parent))
            except UserError as fault:
                if screen:
                    screen.warn(f"passed over: {fault}")
    return sorted(found, key=lambda run: (run.manifest.order, run.manifest.created))


def check_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Refuse to put runs of two bases into one folder. A mix of adapters without a manifest has no known base."""
    for run in every(folder):
        if run.fingerprint and run.fingerprint != base["fingerprint"]:
            raise UserError(
                f"{folder}/ holds runs of the base {run.manifest.base['model']} ({run.fingerprint[:12]}), "
                f"this recipe's is {base['model']} ({base['fingerprint'][:12]}); choose another folder with --runs DIR"
            )


def refuse_existing(target: Path, force: bool, keep_both: str = "--name NEW keeps both") -> None:
    """Refuse a target that exists, unless it may be moved aside; asked before anything slow begins."""
    if target.exists() and not force:
        raise UserError(f"{target} exists; {keep_both}, --force moves the old one aside")


def refuse_busy(target: Path) -> None:
    """Refuse a target that another process is writing."""
    if (target.parent / f".{target.name}.lock").exists():
        processes.by_first(lambda: _lock(target).release())


@contextmanager
def claim(target: Path, screen: Screen, *, force: bool = False) -> Iterator[Path]:
    """Hold a target's lock and yield an empty staging folder beside it; `publish` turns it into the run.

    Of several processes the first one does. The others get folders that nobody will look into.
    """
    held: list[FileLock] = []
    processes.by_first(lambda: held.append(_locked(target, force)))
    if not held:
        with TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    holder, staging = target.parent / f".{target.name}.holder", target.parent / f".{target.name}.staging"
    try:
        if holder.exists():
            screen.note(f"took over {target} from {_holder(target)}, which ended without finishing")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
    except Exception:  # a signal is no failure
        _keep_log(staging, target, screen)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        holder.unlink(missing_ok=True)
        held[0].release()


def _locked(target: Path, force: bool) -> "FileLock":
    lock = _lock(target)
    try:
        refuse_existing(target, force)
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
        raise UserError(f"{target} is being written by {_holder(target)}; wait for it, or choose --name NEW") from None
    except OSError as fault:
        raise UserError(f"cannot write {target.parent}: {fault.strerror}; choose another folder") from fault
    return lock


def publish(staging: Path, target: Path, manifest: Manifest) -> Run:
    """Write the manifest last, everything to the disk, and give the folder its name in one step."""

    def published() -> Run:
        with writing(target, "nothing of it was published, what there was before stays"):
            return _published(staging, target, manifest)

    return processes.by_first(published)


def _published(staging: Path, target: Path, manifest: Manifest) -> Run:
    files = {
        file.relative_to(staging).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(staging.rglob("*"))
        if file.is_file() and file.name != LOG
    }
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    order = _next_order(target, manifest.stage)
    manifest = replace(manifest, files=files, versions=library_versions(), created=created, order=order)
    manifest = replace(manifest, digest=_digest(manifest))
    (staging / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False), encoding="utf-8")
    for name in files:
        shutil.copymode(staging / MANIFEST, staging / name)  # safetensors writes files only their owner can read
    sync(staging)
    if target.exists():
        aside = target.with_name(f"{target.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
        target.rename(aside)
    staging.rename(target)
    sync(target.parent, contents=False)
    return Run(target, manifest)


def _next_order(target: Path, stage: str) -> int:
    """Return microseconds of the clock, or one more than the newest run of the same runs folder where that is more."""
    above = [folder.parent for folder in (target, *target.parents[:2]) if folder.name == stage]
    newest = max((run.manifest.order for folder in above for run in every(folder)), default=0)
    return max(time.time_ns() // 1000, newest + 1)


@contextmanager
def writing(folder: Path, remedy: str, needed: int = 0) -> Iterator[None]:
    """Report a disk that takes no more in one line: where, the bytes `needed` where they are known, the remedy."""
    try:
        yield
    except OSError as fault:
        why = first_line(fault) if fault.strerror is None else fault.strerror
        bytes_ = f" ({_size(needed)} to write, {_size(_free(folder))} free)" if needed else ""
        raise RunFailedError(f"{folder}: {why}{bytes_}; {remedy}") from fault


def check_room(folder: Path, needed: int, remedy: str) -> None:
    """Refuse to begin where the disk cannot hold what will be written."""
    if (free := _free(folder)) < needed:
        told = f"about {_size(needed)} will be written, {_size(free)} are free"
        raise UserError(f"{folder}: {told}; {remedy}")


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _size(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def refuse_missing_parent(out: Path) -> None:
    """Refuse a path to write whose folder is not there; asked before anything slow begins."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first (mkdir -p), or choose another")


def library_versions() -> dict[str, str]:
    """The versions a result may depend on."""
    import platform
    from importlib.metadata import version

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
    return {"lora-align": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def sha256(file: Path) -> str:
    """Of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _keep_log(staging: Path, target: Path, screen: Screen) -> None:
    """What libraries said before a failure outlives the unfinished run."""
    log = staging / LOG
    if log.is_file() and log.stat().st_size:
        kept = target.with_name(f"{target.name}.failed-log.txt")
        log.replace(kept)
        screen.note(f"what the libraries had to say is in {kept}")


def _holder(target: Path) -> str:
    holder = target.parent / f".{target.name}.holder"
    return holder.read_text() if holder.exists() else "another process"


def sync(folder: Path, *, contents: bool = True) -> None:
    """Have the disk, not only the kernel, hold a folder and what is in it."""
    for path in (*(folder.rglob("*") if contents else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """Where quantised bases, tokenised rows, references and libraries' chatter go; `LORA_ALIGN_CACHE` moves it."""
    import platformdirs

    return Path(os.environ.get("LORA_ALIGN_CACHE") or platformdirs.user_cache_dir("lora-align"))

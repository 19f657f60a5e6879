"""Lock, publish, list, read and verify runs, the folders of finished stages.

A run is published completely or not at all; readers trust only its manifest.
"""

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

from lora_align import __version__, processes, store
from lora_align.console import Screen
from lora_align.errors import UserError, first_line
from lora_align.weights import NAME

if TYPE_CHECKING:
    from filelock import FileLock

SCHEMA = 1
DEFAULT = Path("runs")
MANIFEST = "manifest.json"
LOG = "log.txt"
REMEDY = "nothing was published, and an earlier run is unchanged; free disk space and try again"
DIVERGED = "diverged: "  # prefix of a reason in `Manifest.unconverged` that means divergence
TRAINING = ("sft", "dpo", "reward", "rsf")  # stages that train an adapter


def command(words: str, folder: Path) -> str:
    """Return a command line for messages, with --runs if the runs folder is not the default."""
    return f"lora-align {words}" + (f" --runs {shlex.quote(str(folder))}" if folder != DEFAULT else "")


@dataclass(frozen=True)
class Manifest:
    """The description of a run: its stage, inputs, metrics, and the size and sha256 of every file."""

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
    order: int = 0  # order of publication: larger than in every earlier run, even if the clock was set back
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA
    digest: str = ""  # sha256 of all the above


@dataclass(frozen=True)
class Run:
    """A published folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the run's base."""
        return str(self.manifest.base["fingerprint"])

    def as_json(self) -> dict[str, Any]:
        """Return the data that commands print about a run with --json."""
        shown = ("stage", "preference", "direction", "created", "contains_start", "parents", "metrics", "unconverged")
        manifest = {name: getattr(self.manifest, name) for name in shown}
        return {"path": str(self.path), "base": self.manifest.base.get("model"), **manifest}

    def refuse_other_base(self, fingerprint: str) -> None:
        """Refuse a run that was trained on another base than the one with this fingerprint."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"{self.path} was trained on another base ({self.fingerprint[:12]}); name its recipe with --recipe, or "
                "train it again on this base"
            )

    def check_files(self) -> None:
        """Refuse a run if any of its files was changed or removed since publication."""
        for name, known in self.manifest.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else -1
            if size != known["bytes"]:
                state = "is missing" if size < 0 else f"has {size:,} bytes"
                raise UserError(
                    f"{file} {state}, but its manifest says {known['bytes']:,} bytes; train or merge the run again"
                )
            if store.sha256(file) != known["sha256"]:
                raise UserError(f"{file}: changed since publication (other sha256); train or merge the run again")


def read(path: Path) -> Run:
    """Return the run in a folder; refuse a manifest that is damaged or of another schema."""
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise UserError(
                f"{path}: manifest schema {data.get('schema')!r}, but this version reads {SCHEMA}; make the run again"
            )
        data["parents"], data["unconverged"] = tuple(data["parents"]), tuple(data["unconverged"])
        manifest = Manifest(**data)
        _check_types(manifest)
        if manifest.digest != digest(data):
            raise ValueError("changed since publication: other sha256")
    except FileNotFoundError:
        raise UserError(f"no run in {path}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        why = f"no key {fault}" if isinstance(fault, KeyError) else first_line(fault)
        raise UserError(f"{path / MANIFEST}: damaged ({why}); make the run again") from fault
    return Run(path, manifest)


def _check_types(manifest: Manifest) -> None:
    """Raise a TypeError if a value of the manifest has a type that its readers do not expect."""
    for known in fields(manifest):
        value = getattr(manifest, known.name)
        if not isinstance(value, cast(type, get_origin(known.type) or known.type)):
            raise TypeError(f"{known.name} is of type {type(value).__name__}")
    texts = [*manifest.unconverged, manifest.base["model"], manifest.base["fingerprint"]]
    texts += [file["sha256"] for file in manifest.files.values()] + [parent["name"] for parent in manifest.parents]
    numbers = [file["bytes"] for file in manifest.files.values()] + [parent["weight"] for parent in manifest.parents]
    held_out = manifest.metrics.get("held_out", {})
    tables = {"held_out": held_out, **{key: manifest.method.get(key, {}) for key in ("vectors", "axes")}}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise TypeError(f"{name} is of type {type(table).__name__}")
    numbers += [manifest.metrics.get(name, 0) for name in ("points", "norm")]
    numbers += [held_out.get("pairs", 0), held_out.get("accuracy") or 0]
    if manifest.stage == "mix":
        texts.append(manifest.method.get("name", ""))
        numbers += [manifest.method.get("rank", 0), manifest.metrics.get("left_out", 0)]
    wrong = [value for value in texts if not isinstance(value, str)]
    wrong += [value for value in numbers if not isinstance(value, int | float)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is of type {type(wrong[0]).__name__}")


def digest(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content without its digest, independent of the file's layout."""
    return hashlib.sha256(json.dumps({**content, "digest": ""}, sort_keys=True).encode()).hexdigest()


def is_run(path: Path) -> bool:
    """Return whether a folder holds a manifest."""
    return (path / MANIFEST).is_file()


def list_runs(folder: Path, screen: Screen | None = None) -> list[Run]:
    """Return all runs below a folder in order of publication, without unfinished ones and those moved aside.

    Runs with a damaged manifest are skipped with a warning on `screen`.
    """
    runs = []
    for manifest in folder.rglob(MANIFEST):
        if all(NAME.fullmatch(part) for part in manifest.parent.relative_to(folder).parts):
            try:
                runs.append(read(manifest.parent))
            except UserError as fault:
                if screen:
                    screen.warn(f"skipped: {fault}")
    return sorted(runs, key=lambda run: (run.manifest.order, run.manifest.created))


def check_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Refuse to put runs of two bases into one folder. Runs without a known base are ignored."""
    for run in list_runs(folder):
        if run.fingerprint and run.fingerprint != base["fingerprint"]:
            raise UserError(
                f"{folder}/ holds runs of the base {run.manifest.base['model']} ({run.fingerprint[:12]}), "
                f"this recipe's is {base['model']} ({base['fingerprint'][:12]}); choose another folder with --runs DIR"
            )


def refuse_existing(target: Path, force: bool, remedy: str = "--name NEW keeps both") -> None:
    """Refuse a target that exists, unless `force`. Call this before slow work."""
    if target.exists() and not force:
        raise UserError(f"{target} exists; {remedy}, --force moves the old one aside")


def refuse_before_training(target: Path, *, force: bool, resume: bool, remedy: str = "--name NEW keeps both") -> None:
    """Refuse a target that is being written, or that exists, unless `force` is set or `resume` continues its run."""
    refuse_busy(target)
    if not (resume and is_run(target)):
        refuse_existing(target, force, remedy)


def refuse_busy(target: Path) -> None:
    """Refuse a target that another process is writing."""
    if (target.parent / f".{target.name}.lock").exists():
        processes.on_rank_0(lambda: _lock(target).release())


@contextmanager
def staging_folder(target: Path, screen: Screen, *, force: bool = False) -> Iterator[Path]:
    """Lock a target and yield an empty staging folder beside it, which `publish` turns into the run.

    Only rank 0 locks. The other ranks get temporary folders, whose contents are discarded.
    """
    locks: list[FileLock] = []
    processes.on_rank_0(lambda: locks.append(_lock_unless_exists(target, force)))
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

    return processes.on_rank_0(publish_and_report)


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


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result may depend on."""
    import platform
    from importlib.metadata import version

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
    return {"lora-align": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


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

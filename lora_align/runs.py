"""List, read and verify runs, the folders of finished stages. Readers trust only a run's manifest."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_origin

from lora_align import __version__, store
from lora_align.console import Screen
from lora_align.errors import UserError, first_line
from lora_align.mix_weights import NAME

SCHEMA = 1
DEFAULT = Path("runs")
MANIFEST = "manifest.json"
LOG = "log.txt"
DIVERGED = "diverged: "  # prefix of a reason in `Manifest.unconverged` that means divergence
TRAINING = ("sft", "dpo", "reward", "rsf")  # stages that train an adapter
FROM_RECIPE = (*TRAINING, "pairs")  # stages whose recipe is the default of later commands


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

    @property
    def judged(self) -> bool:
        """Return whether enough rows were held out to judge this run, or each run of this mix."""
        return bool(self.manifest.metrics.get("enough_held_out", True))

    def doubt(self, reason: str) -> str:
        """Return a warning with one of the manifest's reasons."""
        return f"{self.path} {'' if reason.startswith(DIVERGED) else 'is unconverged: '}{reason}"

    def doubts(self) -> list[str]:
        """Return the reasons to doubt that the run learned what it was trained on."""
        reasons = [self.doubt(why) for why in self.manifest.unconverged]
        return reasons if self.judged else [*reasons, f"{self.path}: too few rows were held out to judge it"]

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
        raise UserError(f"no run in {path}; `lora-align list` shows the runs") from None
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


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result may depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"lora-align": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"):
        with suppress(PackageNotFoundError):  # vLLM's environment lacks some
            versions[name] = version(name)
    return versions

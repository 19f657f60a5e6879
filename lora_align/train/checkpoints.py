"""Checkpoints of an unfinished run: written completely or not at all, verified, resumed bit-exactly.

`.pos.unfinished` lies beside the run `pos`. Its folder `checkpoint-120` holds everything to resume after step 120. The
two newest checkpoints are stored.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_align import distributed, runs, store
from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.base import Base
from lora_align.recipe import Recipe
from lora_align.runs import Run

IDENTITY, PREFIX = "identity.json", "checkpoint-"
CHECKPOINTS_STORED = 2
# recipe keys that a resumed run may change: they change rounding, logging or the number of policies, not a policy
MAY_DIFFER = {"tokens_per_batch", "save_minutes", "report_to", "gradient_checkpointing", "compile", "iterations"}
LISTED_DIFFERENCES = 4  # differences that an error lists


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run that is not published yet."""

    folder: Path
    identity: Mapping[str, Any]
    restart: bool = False  # ignore existing checkpoints
    bytes_each: int = 0  # the size of a checkpoint, 0 if not known yet

    @classmethod
    def of(
        cls, target: Path, identity: Mapping[str, Any], *, resume: bool, force: bool, screen: Screen
    ) -> "Checkpoints":
        """Return the checkpoints beside a target.

        Refuse existing checkpoints without --resume or --force, and those of another recipe or dataset.
        """
        unfinished = cls(checkpoint_folder(target), json.loads(json.dumps(identity)), restart=force)
        if force:
            return unfinished
        step = max((step for step, _ in unfinished._all()), default=None)
        if step is not None and not resume:
            raise UserError(f"{target} is unfinished (step {step}): --resume continues it, --force starts again")
        if step is not None:
            unfinished._check(target, screen)
        return unfinished

    def begin(self, screen: Screen) -> Path | None:
        """Return the newest intact checkpoint, or None. The caller holds the run's lock."""
        return distributed.on_rank_0(lambda: self._newest(screen))

    def _newest(self, screen: Screen) -> Path | None:
        if self.restart:
            self.clear()
        return next(self._intact(screen), None)

    def make_staging(self, staging: Path) -> None:
        """Make an empty folder to write a checkpoint into."""
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def write_error(self, staging: Path, fault: Exception) -> RunFailedError:
        """Delete a checkpoint that could not be written and return the error; earlier checkpoints are unchanged."""
        written = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file()) if staging.exists() else 0
        shutil.rmtree(staging, ignore_errors=True)
        return RunFailedError(
            f"{staging.parent}: a checkpoint could not be written ({first_line(fault)}) after {written / 1e6:,.1f} of "
            f"about {self.bytes_each / 1e6:,.1f} MB; {self.remaining()}"
        )

    def remaining(self) -> str:
        """Say which checkpoint is left after a failure."""
        older = sorted((step for step, _ in self._all()), reverse=True)
        return (
            f"--resume continues from the checkpoint of step {older[0]}"
            if older
            else "there is no checkpoint yet; free disk space and try again"
        )

    def add(self, staging: Path, step: int) -> None:
        """Publish a written checkpoint, and delete all but the newest CHECKPOINTS_STORED."""
        with store.new_file(self.folder / IDENTITY) as file:
            file.write_text(json.dumps(self.identity))
        store.seal(staging, self.folder / f"{PREFIX}{step}")
        for _, old in sorted(self._all(), reverse=True)[CHECKPOINTS_STORED:]:
            shutil.rmtree(old)

    @property
    def count(self) -> int:
        """Return the number of checkpoints."""
        return sum(1 for _ in self._all())

    @property
    def tensorboard_folder(self) -> Path:
        """Return the folder beside the run into which TensorBoard writes."""
        return self.folder.with_name(f"{self.folder.name.removeprefix('.').removesuffix('.unfinished')}.tensorboard")

    def clear(self) -> None:
        """Delete all checkpoints, for example once the run is published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob(f"{PREFIX}*"):
            number = path.name.removeprefix(PREFIX)
            if number.isdecimal():
                yield int(number), path

    def _intact(self, screen: Screen) -> Iterator[Path]:
        """Yield the intact checkpoints, newest first. Report the others."""
        for _, path in sorted(self._all(), reverse=True):
            if damaged := store.damaged_file(path):
                screen.note(f"{path} is skipped: {damaged} is missing or was changed")
            else:
                yield path

    def find_published(self, target: Path, screen: Screen) -> Run | None:
        """Return the target's published run, and delete its leftover checkpoints.

        Return None if there is none, or if these checkpoints replace it. Refuse a run of another recipe or dataset.
        """
        if not runs.is_run(target) or has_newer_checkpoints(target):
            return None
        run = runs.read(target)
        old = run.manifest
        before = {**self.identity, "base": base_identity(old.base, old.recipe["base"]), "start": old.start}
        before["recipe"] = {key: old.recipe.get(key) for key in self.identity["recipe"]}
        fingerprint = old.data.get("fingerprint")
        before["data"] = fingerprint or {source: facts["fingerprint"] for source, facts in old.data.items()}
        self._refuse_differences(before, f"{run.path} was made")
        screen.note(f"{target} is published already")
        self.clear()  # a kill between publishing and clearing leaves checkpoints
        return run

    def _check(self, target: Path, screen: Screen) -> None:
        """Refuse another recipe or dataset than before; warn of other library versions."""
        try:
            before = json.loads((self.folder / IDENTITY).read_text())
        except (OSError, ValueError) as fault:
            raise UserError(f"{self.folder / IDENTITY}: {fault}; --force starts again") from fault
        versions = list(_changed_keys(before.pop("versions", {}), self.identity["versions"]))
        if versions:
            changed = ", ".join(f"{name} {was} (now {now})" for name, was, now in versions)
            screen.warn(f"{target} was begun with {changed}; results may differ by rounding")
        self._refuse_differences(before, f"{target} was begun")

    def _refuse_differences(self, before: Mapping[str, Any], what: str) -> None:
        now = {key: value for key, value in self.identity.items() if key in before}
        if changed := list(differences(before, now)):
            more = f" and {len(changed) - LISTED_DIFFERENCES} more" if len(changed) > LISTED_DIFFERENCES else ""
            listed = "; ".join(changed[:LISTED_DIFFERENCES])
            option = "--runs DIR" if self.identity["stage"] == "sft" else "--name NEW"  # sft has no --name
            raise UserError(f"{what} differently: {listed}{more}; --force starts again, {option} keeps both")


def checkpoint_folder(target: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return target.parent / f".{target.name}.unfinished"


def has_newer_checkpoints(target: Path) -> bool:
    """Return whether the checkpoints are newer than the published run: --force began a run that will replace it."""
    manifest = target / runs.MANIFEST
    published = manifest.stat().st_mtime_ns if manifest.exists() else 0
    return any(path.stat().st_mtime_ns > published for path in checkpoint_folder(target).glob(f"{PREFIX}*"))


def run_identity(stage: str, recipe: Recipe, base: Base, start: str, data: Any) -> dict[str, Any]:
    """Return the identity of a run. `data` is the fingerprint of the rows.

    A run resumes only if its identity is unchanged. Other library versions only cause a warning.
    """
    settings = recipe.as_dict()
    return {
        "stage": stage,
        "base": base_identity(base.identity, settings["base"]),
        "start": start,
        "recipe": {key: settings.get(key) for key in ("lora", stage)},
        "data": data,
        "versions": runs.library_versions(),
    }


def base_identity(identity: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a base's identity that decide a result: all but the model's name and revision."""
    same = {name: identity.get(name) for name in ("fingerprint", "quantization", "double_quant", "chat_format")}
    return {**same, "dtype": table["dtype"]}


def differences(before: Any, now: Any) -> Iterator[str]:
    """Yield `KEY was OLD, is NEW` for each difference that may change a result; `KEY changed` for a hash."""
    for key, was, is_ in _changed_keys(before, now):
        if key.rpartition(".")[2] not in MAY_DIFFER:
            name = key.removeprefix("recipe.")
            hashed = all(re.fullmatch(r"[0-9a-f]{64}", str(value)) for value in (was, is_))
            yield f"{name} changed" if hashed else f"{name} was {was}, is {is_}"


def _changed_keys(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            if name not in before and not now[name]:
                continue  # a key that an older version did not have, with an empty value
            yield from _changed_keys(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now

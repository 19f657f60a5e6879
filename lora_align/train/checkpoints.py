"""Work that is not finished: written whole or not at all, believed only by its hashes, and gone on with bit by bit.

`.pos.unfinished` stands beside the run it is to become. In it, `checkpoint-120` is what the trainer needs to go on
after step 120; the two newest are kept.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_align import processes, runs
from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.base import Base
from lora_align.recipe import Recipe
from lora_align.runs import Run

WHO, FILES, PREFIX = "who.json", "files.json", "checkpoint-"
KEPT = 2
# change no result, but for rounding
FREE = {"tokens_per_batch", "save_minutes", "report_to", "gradient_checkpointing", "compile", "iterations"}
SHOWN = 4  # differences that an error tells


@dataclass(frozen=True)
class Unfinished:
    """The checkpoints of a run that is not published yet."""

    folder: Path
    who: Mapping[str, Any]
    anew: bool = False  # what lies there is not to be gone on with
    bytes_each: int = 0  # what a checkpoint takes, as far as is known

    @classmethod
    def of(cls, target: Path, who: Mapping[str, Any], *, resume: bool, force: bool, screen: Screen) -> "Unfinished":
        """Refused where unfinished work lies and nobody said what is to become of it, or it is not this work's."""
        found = cls(beside(target), json.loads(json.dumps(who)), anew=force)
        if force:
            return found
        step = max((step for step, _ in found._all()), default=None)  # which are whole is found out where work begins
        if step is not None and not resume:
            raise UserError(f"{target} is unfinished (step {step}): --resume goes on, --force begins anew")
        if step is not None:
            found._check(target, screen)
        return found

    def begin(self, screen: Screen) -> Path | None:
        """The newest checkpoint that is whole, where work is to go on; called by whoever holds the run's lock."""
        return processes.on_rank_0(lambda: self._begun(screen))

    def _begun(self, screen: Screen) -> Path | None:
        if self.anew:
            self.clear()
        return next((path for _, path in self._whole(screen)), None)

    def make_room(self, staging: Path) -> None:
        """An empty folder to write a checkpoint into."""
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def not_written(self, staging: Path, fault: Exception) -> RunFailedError:
        """What to tell when a checkpoint could not be written: the one before is as good as it was."""
        held = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file()) if staging.exists() else 0
        shutil.rmtree(staging, ignore_errors=True)
        return RunFailedError(
            f"{staging.parent}: a checkpoint of about {self.bytes_each / 1e6:,.1f} MB broke off after "
            f"{held / 1e6:,.1f} MB ({first_line(fault)}); {self.kept()}"
        )

    def kept(self) -> str:
        """What is left of work that failed."""
        older = sorted((step for step, _ in self._all()), reverse=True)
        return (
            f"the checkpoint of step {older[0]} is whole, --resume goes on from it"
            if older
            else "there is no checkpoint yet"
        )

    def keep(self, staging: Path, step: int) -> None:
        """Give a written checkpoint its name, once the disk holds it; older ones go."""
        files = {file.name: runs.sha256(file) for file in sorted(staging.iterdir())}
        (staging / FILES).write_text(json.dumps(files))
        unfinished = self.folder / f".{WHO}"
        unfinished.write_text(json.dumps(self.who))
        runs.sync(staging)
        unfinished.replace(self.folder / WHO)
        target = self.folder / f"{PREFIX}{step}"
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        runs.sync(self.folder, contents=False)
        for _, old in sorted(self._all(), reverse=True)[KEPT:]:
            shutil.rmtree(old)

    @property
    def count(self) -> int:
        """Checkpoints that lie there."""
        return sum(1 for _ in self._all())

    @property
    def events(self) -> Path:
        """Where TensorBoard's files go: beside the run, as one looks at them while it is made."""
        return self.folder.with_name(f"{self.folder.name.removeprefix('.').removesuffix('.unfinished')}.tensorboard")

    def clear(self) -> None:
        """The run is published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob(f"{PREFIX}*"):
            number = path.name.removeprefix(PREFIX)
            if number.isdecimal():
                yield int(number), path

    def _whole(self, screen: Screen) -> Iterator[tuple[int, Path]]:
        """Newest first; one that is not as it was written is passed over, and that is said."""
        for step, path in sorted(self._all(), reverse=True):
            try:
                files = json.loads((path / FILES).read_text())
                damaged = next((name for name, known in files.items() if runs.sha256(path / name) != known), "")
            except (OSError, ValueError) as fault:
                damaged = getattr(fault, "filename", None) or FILES
            if damaged:
                screen.note(f"{path} is passed over: {Path(damaged).name} is missing or not as it was written")
            else:
                yield step, path

    def made(self, target: Path, screen: Screen) -> Run | None:
        """A run that is published already, where it is this work's; None where there is none."""
        if not runs.is_run(target):
            return None
        run = runs.read(target)
        made = run.manifest
        before = {**self.who, "base": base_of(made.base, made.recipe["base"]), "start": made.start}
        before["recipe"] = {key: made.recipe.get(key) for key in self.who["recipe"]}
        one = made.data.get("fingerprint")
        before["data"] = one or {source: of["fingerprint"] for source, of in made.data.items()}
        self._refuse(before, f"{run.path} was made")
        screen.note(f"{target} was made before")
        self.clear()  # what stands there still, if it was killed between the two
        return run

    def _check(self, target: Path, screen: Screen) -> None:
        """Refuse to go on with another recipe or other data; other versions of libraries are only said."""
        try:
            before = json.loads((self.folder / WHO).read_text())
        except (OSError, ValueError) as fault:
            raise UserError(f"{self.folder / WHO}: {fault}; --force begins anew") from fault
        versions = list(_unlike(before.pop("versions", {}), self.who["versions"]))
        if versions:
            screen.warn(f"{target} was begun with " + ", ".join(f"{name} {was}" for name, was, _ in versions))
        self._refuse(before, f"{target} was begun")

    def _refuse(self, before: Mapping[str, Any], what: str) -> None:
        now = {key: value for key, value in self.who.items() if key in before}
        told = list(differences(before, now))
        if told:
            more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
            told_all = "; ".join(told[:SHOWN])
            raise UserError(f"{what} differently: {told_all}{more}; --force begins anew, --name NEW keeps both")


def beside(target: Path) -> Path:
    """Where a run's unfinished work lies."""
    return target.parent / f".{target.name}.unfinished"


def run_identity(stage: str, recipe: Recipe, base: Base, start: str, data: Any) -> dict[str, Any]:
    """What has to be the same for work to go on; `data` is what names the rows."""
    settings = recipe.as_dict()
    return {
        "stage": stage,
        "base": base_of(base.identity, settings["base"]),
        "start": start,
        "recipe": {key: settings.get(key) for key in ("lora", stage)},
        "data": data,
        "versions": runs.library_versions(),
    }


def base_of(identity: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """What a base does, wherever it lies."""
    same = {name: identity.get(name) for name in ("fingerprint", "quantization", "double_quant", "chat_format")}
    return {**same, "dtype": table["dtype"]}


def differences(before: Any, now: Any) -> Iterator[str]:
    """What is not as it was, in words, of what may change a result."""
    for key, was, is_ in _unlike(before, now):
        if key.rpartition(".")[2] not in FREE:
            yield f"{key} was {was}, is {is_}"


def _unlike(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            if name not in before and not now[name]:
                continue  # recipes had no word for it yet, and nothing is asked for
            yield from _unlike(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now

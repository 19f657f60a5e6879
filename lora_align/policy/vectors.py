"""From the name of a preference, a run or a folder to the update it stands for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import runs, store
from lora_align.adapters.module_names import parse_name
from lora_align.adapters.peft_config import CONFIG, WEIGHTS
from lora_align.errors import UserError, nearest
from lora_align.recipe import DEFAULT, LOCAL
from lora_align.runs import Run
from lora_align.weights import NAME

if TYPE_CHECKING:  # names are found without torch
    from lora_align.adapters.delta import LoraDelta
    from lora_align.adapters.peft_format import Adapter

STRETCH = re.compile(r"(\d+)(?:-(\d+))?")  # behind a name and @: layers


@dataclass(frozen=True)
class Parent:
    """An adapter folder and its sign in the sum; a run where it has a manifest."""

    folder: Path
    sign: float
    run: Run | None

    def open(self) -> "Adapter":
        """The adapter, after its files were found to be the published ones."""
        from lora_align.adapters.peft_format import Adapter

        if self.run:
            self.run.check_files()
        return Adapter(self.folder, whole=self.run is not None)

    def lineage(self) -> dict[str, Any]:
        """What a mix's manifest says of it."""
        file = self.folder / WEIGHTS
        known = self.run.manifest.files[WEIGHTS]["sha256"] if self.run else store.sha256(file)
        config = store.sha256(self.folder / CONFIG)  # its scaling is in there
        return {"folder": str(self.folder), "sign": self.sign, "sha256": known, "config_sha256": config}


@dataclass(frozen=True)
class Vector:
    """A named direction: pos minus neg of a preference, or one adapter as it is. `helpful@0-3` is of these layers."""

    name: str
    parents: tuple[Parent, ...]
    layers: tuple[int, int] | None = None  # the first and the last

    def load(self) -> "LoraDelta":
        """The update itself."""
        return opened({self.name: self})[0][self.name]

    def policy(self) -> "Vector":
        """Of a preference the adapter towards it alone; anything else is one policy already."""
        return replace(self, parents=self.parents[:1])

    def without(self, run: Run) -> "Vector":
        """This minus a run's adapter, which it contains."""
        return replace(self, parents=(*self.parents, Parent(run.path, -1.0, run)))

    def lineage(self) -> list[Any]:
        """What it is made of, wherever that lies: signs, files, layers."""
        parents = [parent.lineage() for parent in self.parents]
        return [[[of["sign"], of["sha256"], of["config_sha256"]] for of in parents], list(self.layers or [])]

    def reaching(self, update: "LoraDelta") -> "LoraDelta":
        """As much of its parents' sum as lies in its layers."""
        if self.layers is None:
            return update
        first, last = self.layers
        inside = [name for name in update if (at := parse_name(name)) and first <= at.layer <= last]
        if not inside:
            raise UserError(
                f"{self.name}: nothing of it lies in layers {first} to {last} (its last is {layer_count(update) - 1})"
            )
        return update.only(inside)

    def known_runs(self) -> list[Run]:
        """The runs among its parents."""
        return [parent.run for parent in self.parents if parent.run]

    def unconverged(self) -> list[str]:
        """Which of its runs learned nothing, and how that shows; a mix hands on what its parents said."""
        return [
            why if run.manifest.stage == "mix" else f"{run.path} is unconverged: {why}"
            for run in self.known_runs()
            for why in run.manifest.unconverged
        ]

    def doubts(self) -> list[str]:
        """Why it may not do what its name says."""
        found = self.unconverged()
        if len({run.manifest.data.get("fingerprint") for run in self.known_runs()}) > 1:
            found.append(f"{self.name}: pos and neg were trained on different pairs")
        if len({run.manifest.initial_adapter for run in self.known_runs()}) > 1:
            found.append(f"{self.name}: pos and neg started from different values of A; their difference is noisy")
        return found


def find(name: str, runs_dir: Path, preferences: Iterable[str] = (), words: Iterable[str] = ()) -> Vector:
    """The vector of that name; `preferences` are the recipe's, to tell untrained from unknown."""
    whole, _, layers = name.rpartition("@")
    if (stretch := STRETCH.fullmatch(layers)) and whole and not Path(name).exists():
        first, last = int(stretch[1]), int(stretch[2] or stretch[1])
        return replace(find(whole, runs_dir, preferences), name=name, layers=(first, last))
    if "/" in name or name.startswith("."):
        inside = runs_dir / name
        return at(inside if (inside / CONFIG).is_file() else Path(name).expanduser(), name)
    folder = runs_dir / "dpo" / name
    trained = [d for d in ("pos", "neg") if NAME.fullmatch(name) and runs.is_run(folder / d)]
    if len(trained) == 2:
        return Vector(name, (_parent(folder / "pos", 1.0), _parent(folder / "neg", -1.0)))
    if trained:
        done = runs.read(folder / trained[0]).manifest
        missing = "neg" if trained == ["pos"] else "pos"
        named = f" --name {name}" if done.preference != name else ""
        command = runs.command(f"dpo --pref {done.preference} --direction {missing}{named}", runs_dir)
        if not LOCAL.exists() and (source := done.recipe.get("source", "")) not in ("", DEFAULT):
            command += f" --recipe {source}"
        raise UserError(f"{name}: only {trained[0]} is trained; its twin comes from: {command}")
    if NAME.fullmatch(name) and runs.is_run(runs_dir / "mix" / name):
        return at(runs_dir / "mix" / name, name)
    if (Path(name) / CONFIG).is_file():
        return at(Path(name), name)
    if name in preferences:
        command = runs.command(f"dpo --pref {name} --direction both", runs_dir)
        raise UserError(f"{name} is not trained in {runs_dir}/; first: {command}")
    known = sorted({*_published_names(runs_dir), *preferences, *words})
    raise UserError(f"no preference or run {name!r} in {runs_dir}/{nearest(name, known)} (known: {', '.join(known)})")


def at(folder: Path, name: str) -> Vector:
    """One adapter folder as it is."""
    return Vector(name, (_parent(folder, 1.0),))


def opened(vectors: Mapping[str, Vector]) -> tuple[dict[str, "LoraDelta"], list["Adapter"]]:
    """The updates, and the adapters that they are made of, each folder opened once."""
    from lora_align.adapters.delta import LoraDelta, total

    parents = {parent.folder.resolve(): parent for vector in vectors.values() for parent in vector.parents}
    adapters = {folder: parent.open() for folder, parent in parents.items()}
    updates = {
        key: vector.reaching(
            total([LoraDelta.of(adapters[parent.folder.resolve()]) * parent.sign for parent in vector.parents])
        )
        for key, vector in vectors.items()
    }
    return updates, list(adapters.values())


def stretches(name: str, layers: int, count: int) -> list[str]:
    """The names of a vector's parts: so many, of about as many layers each."""
    ends = [layers * part // count for part in range(count + 1)]
    return [f"{name}@{first}-{end - 1}" for first, end in pairwise(ends) if end > first]


def layer_count(update: Iterable[str]) -> int:
    """How many layers a model has at least, by the names of modules."""
    return max((at.layer + 1 for at in map(parse_name, update) if at), default=0)


def common(vectors: Iterable[Vector]) -> tuple[dict[str, Any] | None, str]:
    """The base and the start adapter that all vectors with a manifest stand on; an error where they differ."""
    found = [run for vector in vectors for run in vector.known_runs() if run.fingerprint]
    if not found:
        return None, ""
    first = found[0]
    for run in found[1:]:
        if run.fingerprint != first.fingerprint:
            raise UserError(
                f"{run.path} and {first.path} stand on different bases ({run.manifest.base['model']}, "
                f"{first.manifest.base['model']}); adapters of different bases do not add"
            )
        if run.manifest.start != first.manifest.start:
            raise UserError(
                f"{run.path} and {first.path} stand on different start adapters; train both on the same one"
            )
    return dict(first.manifest.base), first.manifest.start


def refuse_start_inside(vectors: Iterable[Vector], with_start: bool = True) -> None:
    """Refuse to weigh what contains the start adapter where that is added anyway, with weight 1."""
    for vector in vectors:
        for run in vector.known_runs():
            if run.manifest.stage == "sft":
                if with_start:
                    raise UserError(f"{run.path} is the start adapter; it lies under every mix, with weight 1")
            elif run.manifest.contains_start:
                raise UserError(
                    f"{run.path} contains the start adapter, and its weight would scale that too; "
                    "name its preferences, or make it again --without-start"
                )


def trained(runs_dir: Path) -> list[str]:
    """The preferences both of whose directions are published."""
    return sorted(p.name for p in (runs_dir / "dpo").glob("*") if all(runs.is_run(p / d) for d in ("pos", "neg")))


def _published_names(runs_dir: Path) -> list[str]:
    return trained(runs_dir) + [
        p.name for p in (runs_dir / "mix").glob("*") if NAME.fullmatch(p.name) and runs.is_run(p)
    ]


def _parent(folder: Path, sign: float) -> Parent:
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter in {folder}: it has no {CONFIG}")
    return Parent(folder, sign, runs.read(folder) if runs.is_run(folder) else None)

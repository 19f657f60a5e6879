"""Find the vector of a name (a preference, a run or a folder), and load the signed sum of its adapters."""

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
from lora_align.mix_weights import NAME
from lora_align.recipe import DEFAULT, LOCAL
from lora_align.runs import Run

if TYPE_CHECKING:  # torch is imported only to load an update
    from lora_align.adapters.delta import LoraDelta
    from lora_align.adapters.peft_format import Adapter

LAYERS = re.compile(r"(\d+)(?:-(\d+))?")  # the layers after NAME@, as in helpful@0-3


@dataclass(frozen=True)
class Parent:
    """An adapter folder with its sign in a vector, and its run if it has a manifest."""

    folder: Path
    sign: float
    run: Run | None

    def open(self) -> "Adapter":
        """Open the adapter; check the files of a run first."""
        from lora_align.adapters.peft_format import Adapter

        if self.run:
            self.run.check_files()
        return Adapter(self.folder, whole=self.run is not None)

    def lineage(self) -> dict[str, Any]:
        """Return the entry of this adapter in a mix's manifest."""
        file = self.folder / WEIGHTS
        known = self.run.manifest.files[WEIGHTS]["sha256"] if self.run else store.known_sha256(file)
        config = store.sha256(self.folder / CONFIG)  # which holds the scaling
        return {"folder": str(self.folder), "sign": self.sign, "sha256": known, "config_sha256": config}


@dataclass(frozen=True)
class Vector:
    """A named update: `pos` minus `neg` of a preference, or one adapter. `helpful@0-3` has these layers only."""

    name: str
    parents: tuple[Parent, ...]
    layers: tuple[int, int] | None = None  # first and last

    def load(self) -> "LoraDelta":
        """Load the update."""
        return load_updates({self.name: self})[0][self.name]

    def policy(self) -> "Vector":
        """Return the `pos` adapter of a preference as a vector. Return any other vector unchanged."""
        return replace(self, parents=self.parents[:1])

    def without(self, run: Run) -> "Vector":
        """Return this vector minus the adapter of a run."""
        return replace(self, parents=(*self.parents, Parent(run.path, -1.0, run)))

    def lineage(self) -> list[Any]:
        """Return the signs and hashes of the adapters, and the layers; independent of names and folders."""
        parents = [parent.lineage() for parent in self.parents]
        return [[[of["sign"], of["sha256"], of["config_sha256"]] for of in parents], list(self.layers or [])]

    def in_layers(self, update: "LoraDelta") -> "LoraDelta":
        """Return the part of an update in this vector's layers."""
        if self.layers is None:
            return update
        first, last = self.layers
        inside = [name for name in update if (at := parse_name(name)) and first <= at.layer <= last]
        if not inside:
            raise UserError(
                f"{self.name}: the adapter has no layers {first} to {last}; its last layer is {layer_count(update) - 1}"
            )
        return update.only(inside)

    def known_runs(self) -> list[Run]:
        """Return the parents that are runs."""
        return [parent.run for parent in self.parents if parent.run]

    def unconverged(self) -> list[str]:
        """Return the reasons why runs are unconverged. The reasons of a mix are those of its parents."""
        return [
            why if run.manifest.stage == "mix" else run.doubt(why)
            for run in self.known_runs()
            for why in run.manifest.unconverged
        ]

    def judged(self) -> bool:
        """Return whether all parents are runs that were judged on enough held-out rows."""
        return all(parent.run is not None and parent.run.judged for parent in self.parents)

    def warnings(self) -> list[str]:
        """Return the reasons why the vector may not have the effect of its name."""
        reasons = self.unconverged()
        if len({run.manifest.data.get("fingerprint") for run in self.known_runs()}) > 1:
            reasons.append(f"{self.name}: pos and neg were trained on different pairs; train both again on the same")
        if len({run.manifest.initial_adapter for run in self.known_runs()}) > 1:
            reasons.append(
                f"{self.name}: pos and neg started from different values of A, which adds noise; use one lora.init_seed"
            )
        return reasons


def find(name: str, runs_dir: Path, preferences: Iterable[str] = (), words: Iterable[str] = ()) -> Vector:
    """Return the vector of a name.

    An error may suggest a name in `preferences` or `words`. If a name in `preferences` is not trained, the error gives
    the command that trains it.
    """
    whole, _, layers = name.rpartition("@")
    if (span := LAYERS.fullmatch(layers)) and whole and not Path(name).exists():
        first, last = int(span[1]), int(span[2] or span[1])
        return replace(find(whole, runs_dir, preferences), name=name, layers=(first, last))
    if "/" in name or name.startswith("."):
        inside = runs_dir / name
        return from_folder(inside if (inside / CONFIG).is_file() else Path(name).expanduser(), name)
    folder = runs_dir / "dpo" / name
    trained = [d for d in ("pos", "neg") if NAME.fullmatch(name) and runs.is_run(folder / d)]
    if len(trained) == 2:
        return Vector(name, (_parent(folder / "pos", 1.0), _parent(folder / "neg", -1.0)))
    if trained:
        manifest = runs.read(folder / trained[0]).manifest
        missing = "neg" if trained == ["pos"] else "pos"
        named = f" --name {name}" if manifest.preference != name else ""
        command = runs.command(f"dpo --pref {manifest.preference} --direction {missing}{named}", runs_dir)
        if not LOCAL.exists() and (source := manifest.recipe.get("source", "")) not in ("", DEFAULT):
            command += f" --recipe {source}"
        raise UserError(f"{name}: only {trained[0]} is trained; `{command}` trains {missing}")
    if NAME.fullmatch(name) and runs.is_run(runs_dir / "mix" / name):
        return from_folder(runs_dir / "mix" / name, name)
    if (Path(name) / CONFIG).is_file():
        return from_folder(Path(name), name)
    if name in preferences:
        command = runs.command(f"dpo --pref {name} --direction both", runs_dir)
        raise UserError(f"{name} is not trained in {runs_dir}/; `{command}` trains it")
    known = sorted({*_published_names(runs_dir), *preferences, *words})
    raise UserError(
        f"no preference or run {name!r} in {runs_dir}/{nearest(name, known)} (known: {', '.join(known) or 'none'})"
    )


def from_folder(folder: Path, name: str) -> Vector:
    """Return the vector of one adapter folder."""
    return Vector(name, (_parent(folder, 1.0),))


def load_updates(vectors: Mapping[str, Vector]) -> tuple[dict[str, "LoraDelta"], list["Adapter"]]:
    """Load the updates of vectors; return them with their adapters. Each folder is opened once."""
    from lora_align.adapters.delta import LoraDelta, total

    parents = {parent.folder.resolve(): parent for vector in vectors.values() for parent in vector.parents}
    adapters = {folder: parent.open() for folder, parent in parents.items()}
    updates = {
        key: vector.in_layers(
            total([LoraDelta.of(adapters[parent.folder.resolve()]) * parent.sign for parent in vector.parents])
        )
        for key, vector in vectors.items()
    }
    return updates, list(adapters.values())


def layer_groups(name: str, layers: int, count: int) -> list[str]:
    """Split a vector's layers into `count` groups of about equal size, and return the groups' names."""
    ends = [layers * part // count for part in range(count + 1)]
    return [f"{name}@{first}-{end - 1}" for first, end in pairwise(ends) if end > first]


def layer_count(update: Iterable[str]) -> int:
    """Return the number of layers of an update, by the names of its modules."""
    return max((at.layer + 1 for at in map(parse_name, update) if at), default=0)


def common_base(vectors: Iterable[Vector]) -> tuple[dict[str, Any] | None, str]:
    """Return the common base and start adapter of all vectors with a manifest. Refuse vectors whose own differ."""
    made = [run for vector in vectors for run in vector.known_runs() if run.fingerprint]
    if not made:
        return None, ""
    first, *others = made
    for run in others:
        if run.fingerprint != first.fingerprint:
            raise UserError(
                f"{run.path} and {first.path} were trained on different bases ({run.manifest.base['model']}, "
                f"{first.manifest.base['model']}) and cannot be added"
            )
        if run.manifest.start != first.manifest.start:
            raise UserError(
                f"{run.path} and {first.path} were trained on different start adapters; train both on the same one"
            )
    return dict(first.manifest.base), first.manifest.start


def refuse_start_inside(vectors: Iterable[Vector], with_start: bool = True) -> None:
    """Refuse vectors that contain the start adapter; a mix adds it once, with weight 1."""
    for vector in vectors:
        for run in vector.known_runs():
            if run.manifest.stage == "sft":
                if with_start:
                    raise UserError(
                        f"{run.path} is the start adapter, which every mix contains with weight 1; "
                        "leave it out of the weights"
                    )
            elif run.manifest.contains_start:
                raise UserError(
                    f"{run.path} contains the start adapter, which its weight would scale too; "
                    "name its preferences, or merge it again --without-start"
                )


def trained(runs_dir: Path) -> list[str]:
    """Return the preferences with both adapters, `pos` and `neg`."""
    return sorted(p.name for p in (runs_dir / "dpo").glob("*") if all(runs.is_run(p / d) for d in ("pos", "neg")))


def _published_names(runs_dir: Path) -> list[str]:
    return trained(runs_dir) + [
        p.name for p in (runs_dir / "mix").glob("*") if NAME.fullmatch(p.name) and runs.is_run(p)
    ]


def _parent(folder: Path, sign: float) -> Parent:
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter in {folder}: {CONFIG} is missing")
    return Parent(folder, sign, runs.read(folder) if runs.is_run(folder) else None)

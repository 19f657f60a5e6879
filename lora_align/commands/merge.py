"""The command `merge`: add the start adapter and weighted vectors into one ordinary adapter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from lora_align import run_writer, runs, store
from lora_align.adapters import peft_config, peft_format, same_base
from lora_align.adapters.delta import LoraDelta
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.merge_options import EXACT, MergeOptions, check_weights, server_rank
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.streamed_merge import Merge, Tally
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.mix_weights import LONGEST, name_of
from lora_align.policy import safe_ranges, start_policy, vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Manifest, Run


@dataclass(frozen=True)
class Mix:
    """A published mix."""

    run: Run

    @property
    def rank(self) -> int:
        """Return the largest rank of a module."""
        return int(self.run.manifest.method["rank"])

    @property
    def left_out(self) -> float:
        """Return the share of the energy that truncation removed."""
        return float(self.run.manifest.metrics["left_out"])

    @property
    def size(self) -> int:
        """Return the size of all files in bytes."""
        return sum(file["bytes"] for file in self.run.manifest.files.values())

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return self.run.as_json()

    def summary(self) -> str:
        """Return the mix in one line."""
        truncated = self.left_out > 0 or self.run.manifest.method["requested_rank"]
        energy = f", {self.left_out:.2%} of its energy left out" if truncated else ""
        start = ", with the start adapter" if self.run.manifest.contains_start else ""
        return f"{self.run.path}  rank {self.rank}{energy}{start}, {self.size / 1e6:.1f} MB"


def merge_adapters(
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    how: MergeOptions = EXACT,
    *,
    name: str | None = None,
    out: Path | None = None,
    force: bool = False,
    by_name: Mapping[str, Vector] | None = None,
) -> Mix:
    """Merge the start adapter and the weighted vectors, and publish the result.

    It is truncated if `how` or the method sets a rank.
    `by_name` has the vectors; by default they are found by their names in `weights`.
    """
    if out:
        store.refuse_missing_parent(out)
    target = out or runs_dir / "mix" / (name or default_name(weights, how))
    run_writer.refuse_existing(target, force, "another --out keeps both" if out else "--name NEW keeps both")
    ready = prepare(weights, recipe, runs_dir, how, by_name)
    if ready.base and not out:
        runs.check_base(runs_dir, ready.base)
    # the weights of a soup are shares of policies, not weights of vectors
    far = [] if METHODS[how.method].of_policies else safe_ranges.warnings_beyond_reach(weights, ready.vectors, runs_dir)
    for warning in [*(warning for vector in ready.vectors.values() for warning in vector.warnings()), *far]:
        screen.warn(warning)
    refuse_zero(ready.merge, screen)
    tally, (rank, padded) = Tally(), ranks(ready.merge, how)
    parents_dtype = reduce(torch.promote_types, (adapter.dtype for adapter in ready.adapters))
    dtype = getattr(torch, how.dtype) if how.dtype else parents_dtype
    needed = _bytes(ready.adapters, rank, padded, dtype)
    elsewhere = "make room, or write to another disk with --out DIR"
    store.check_free_space(target.parent, needed, elsewhere)
    with (
        run_writer.staging_folder(target, screen, force=force) as staging,
        store.report_write_errors(target, elsewhere, needed),
    ):
        modules = tally.counted(ready.merge.modules(rank), padded)
        about = BaseInfo.common([adapter.config for adapter in ready.adapters])
        peft_format.save(staging, modules, ready.merge.names(), about, dtype)
        manifest = Manifest(
            stage="mix",
            base=ready.base or {"model": about.base, "fingerprint": "", "note": "no parent has a manifest"},
            recipe=recipe.as_dict(),
            contains_start=len(ready.merge.start) > 0,
            start=ready.start,
            parents=tuple(_lineage(vector, weights[key]) for key, vector in ready.vectors.items()),
            method={
                "name": how.method,
                "paper": METHODS[how.method].paper,
                "weights": dict(weights),
                "options": {**METHODS[how.method].options, **how.options},
                "rank": tally.rank,
                "requested_rank": rank,
                "energy_kept": how.keep,
                "dtype": how.dtype,
                "fit": how.fit,
                "same_base": how.same_base,
                "of_unknown_base": [key for key, vector in ready.vectors.items() if not _base_known(vector)],
            },
            metrics={
                "left_out": tally.left_out,
                "enough_held_out": all(vector.judged() for vector in ready.vectors.values()),
            },
            unconverged=tuple(why for vector in ready.vectors.values() for why in vector.unconverged()),
        )
        return Mix(run_writer.publish(staging, target, manifest))


@dataclass(frozen=True)
class MergeInputs:
    """The opened and checked inputs of a merge."""

    vectors: Mapping[str, Vector]
    adapters: Sequence[Adapter]
    base: Mapping[str, Any] | None
    start: str
    merge: Merge


def prepare(
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    how: MergeOptions,
    by_name: Mapping[str, Vector] | None = None,
) -> MergeInputs:
    """Find, open and check the inputs of a merge; nothing is added yet."""
    check_weights(how.method, weights)
    by_name = by_name or {key: vectors.find(key, runs_dir, recipe.preferences) for key in weights}
    if METHODS[how.method].of_policies:
        by_name = {key: vector.policy() for key, vector in by_name.items()}
    vectors.refuse_start_inside(by_name.values(), how.with_start)
    return opened(weights, by_name, runs_dir, how)


def opened(
    weights: Mapping[str, float], by_name: Mapping[str, Vector], runs_dir: Path, how: MergeOptions
) -> MergeInputs:
    """Open the adapters of vectors, and the start adapter."""
    base, start_id = vectors.common_base(by_name.values())
    updates, adapters = vectors.load_updates(by_name)
    known = all(map(_base_known, by_name.values()))
    same_base.check_same_base(adapters, same_base=how.same_base or known)
    start = LoraDelta(())
    if start_id and how.with_start:
        adapters.append(Adapter(_start(runs_dir, start_id).path, whole=True))
        start = LoraDelta.of(adapters[-1])
    return MergeInputs(by_name, adapters, base, start_id, Merge(updates, weights, how.method, how.options, start))


def refuse_zero(merge: Merge, screen: Screen) -> None:
    """Refuse an update of zero. Warn if only the start adapter remains."""
    if merge.cancels():
        if not merge.start:
            raise UserError("the weighted sum is zero: the adapter would do nothing; change a weight")
        screen.warn("the weighted sum is zero: this mix is the start adapter alone")


def ranks(job: Merge, how: MergeOptions) -> tuple[int | None, int]:
    """Return the rank to truncate to, if any, and the rank to pad to with zeros."""
    rank = job.smallest_rank(how.keep) if how.keep else how.rank
    if not how.fit:
        return rank, 0
    return rank, server_rank(how.fit, max(merged.factors.rank for merged in job.modules(rank)))


def _bytes(adapters: Sequence[Adapter], rank: int | None, padded: int, dtype: torch.dtype) -> int:
    """Estimate the bytes of the mix. Its rank is the sum of its parents' ranks, at least `padded`, at most `rank`."""
    ranks_: Counter[str] = Counter()
    for adapter in adapters:
        ranks_.update({name: peft_config.rank(adapter.config, name) for name in adapter.shapes})
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    return sum(dtype.itemsize * max(min(of, rank or of), padded) * sum(shapes[name]) for name, of in ranks_.items())


def default_name(weights: Mapping[str, float], how: MergeOptions = EXACT) -> str:
    """Return a folder name such as `helpful1_harmless0p5`, or `helpful1_ties_r8` with a method and a rank."""
    parts = [Path(key).name + _in_name(weight) for key, weight in weights.items()]
    options = [how.method] if how.method != EXACT.method else []
    options += [f"r{how.rank}"] if how.rank else [f"auto{_in_name(how.keep)}"] if how.keep else []
    end = "".join(f"_{word}" for word in options)
    return (name_of(parts)[: LONGEST - len(end)] or "mix") + end


def _in_name(number: float) -> str:
    return f"{number:g}".replace("-", "m").replace(".", "p").replace("+", "")


def _start(runs_dir: Path, identity: str) -> Run:
    run = start_policy.published(runs_dir, identity)
    if run is None:
        folder = start_policy.folder(runs_dir)
        raise UserError(
            f"the start adapter of these vectors is not in {folder}; restore it there, or merge --without-start"
        )
    run.check_files()
    return run


def _base_known(vector: Vector) -> bool:
    """Return whether the manifests of all parents record the base. A folder without a manifest can only name it."""
    return all(parent.run and parent.run.fingerprint for parent in vector.parents)


def _lineage(vector: Vector, weight: float) -> dict[str, Any]:
    return {"name": vector.name, "weight": weight, "adapters": [parent.lineage() for parent in vector.parents]}

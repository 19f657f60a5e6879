"""A mix: the start adapter plus weighted vectors, published as one ordinary adapter. No base is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from lora_align import runs
from lora_align.adapters import kin, merge, peft_format, ranges, vectors
from lora_align.adapters.delta import LoraDelta
from lora_align.adapters.merge import Merge, Tally
from lora_align.adapters.peft_config import About
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.vectors import Vector
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.preference import name_of
from lora_align.recipe import Recipe
from lora_align.runs import Manifest, Run
from lora_align.stages import start as start_policy

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class How:
    """The way from vectors to one adapter."""

    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    keep: float | None = None  # the smallest rank that keeps this share of the energy
    fit: str | None = None
    dtype: str | None = None
    with_start: bool = True
    same_base: bool = False

    @classmethod
    def said(
        cls,
        method: str,
        options: Sequence[str],
        rank: str | None,
        fit: str | None,
        dtype: str | None,
        *,
        with_start: bool = True,
        same_base: bool = False,
    ) -> "How":
        """The words of a command line, found to mean something."""
        if fit is not None and fit not in merge.FITS:
            raise UserError(f"--fit {fit!r}: there is {', '.join(merge.FITS)}")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
        number, keep = _asked_rank(rank) if rank is not None else (None, None)
        return cls(method, merge.parsed(method, options), number, keep, fit, dtype, with_start, same_base)


EXACT = How()


def _asked_rank(text: str) -> tuple[int | None, float | None]:
    """`16` as a rank, `auto:0.99` as a share of the energy."""
    word, _, share = text.partition(":")
    try:
        number, keep = (None, float(share)) if word == "auto" else (int(text), None)
    except ValueError:
        number = keep = None
    if (number is not None and number >= 1) or (keep is not None and 0 < keep <= 1):
        return number, keep
    raise UserError(f"--rank {text!r}: a whole number from 1, or auto:0.99 for the smallest that keeps 99 % energy")


def run(
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    how: How = EXACT,
    *,
    name: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> Run:
    """Add up, compress if asked, and publish."""
    target = out or runs_dir / "mix" / (name or default_name(weights))
    runs.refuse_existing(target, force, "another --out keeps both" if out else "--name NEW keeps both")
    ready = prepare(weights, recipe, runs_dir, how)
    if ready.base and not out:
        runs.check_base(runs_dir, ready.base)
    far = ranges.beyond(weights, ready.vectors, runs_dir) if how.method == EXACT.method else []
    for doubt in [*(doubt for vector in ready.vectors.values() for doubt in vector.doubts()), *far]:
        screen.warn(doubt)
    tally, (rank, padded) = Tally(), ranks(ready.merge, how)
    with runs.claim(target, screen, force=force) as staging:
        modules = tally.counted(ready.merge.modules(rank), padded)
        own = reduce(torch.promote_types, (adapter.dtype for adapter in ready.adapters))
        about = About.common([adapter.config for adapter in ready.adapters])
        peft_format.save(staging, modules, ready.merge.names(), about, getattr(torch, how.dtype) if how.dtype else own)
        manifest = Manifest(
            stage="mix",
            base=ready.base or {"model": about.base, "fingerprint": "", "note": "no parent has a manifest"},
            recipe=recipe.as_dict(),
            contains_start=len(ready.merge.start) > 0,
            start=ready.start,
            parents=tuple(_lineage(vector, weights[key]) for key, vector in ready.vectors.items()),
            method={
                "name": how.method,
                "paper": merge.METHODS[how.method].paper,
                "weights": dict(weights),
                "options": {**merge.METHODS[how.method].options, **how.options},
                "rank": tally.rank,
                "asked_rank": rank,
                "energy_kept": how.keep,
                "dtype": how.dtype,
                "fit": how.fit,
                "same_base": how.same_base,
                "of_unknown_base": [key for key, vector in ready.vectors.items() if not _base_known(vector)],
            },
            metrics={"left_out": tally.left_out},
            unconverged=tuple(why for vector in ready.vectors.values() for why in vector.unconverged()),
        )
        return runs.publish(staging, target, manifest)


@dataclass(frozen=True)
class Ready:
    """What a mix is made of, found fit to be added."""

    vectors: Mapping[str, Vector]
    adapters: Sequence[Adapter]
    base: Mapping[str, Any] | None
    start: str
    merge: Merge


def prepare(weights: Mapping[str, float], recipe: Recipe, runs_dir: Path, how: How) -> Ready:
    """Find, open and check everything; nothing is added yet."""
    merge.check_weights(how.method, weights)
    found = {key: vectors.find(key, runs_dir, recipe.preferences) for key in weights}
    if merge.METHODS[how.method].of_policies:
        found = {key: vector.policy() for key, vector in found.items()}
    vectors.refuse_start_inside(found.values(), how.with_start)
    base, start_id = vectors.common(found.values())
    updates, adapters = vectors.opened(found)
    known = all(map(_base_known, found.values()))
    kin.refuse_strangers(adapters, same_base=how.same_base or known)
    start = LoraDelta(())
    if start_id and how.with_start:
        adapters.append(Adapter(_start(runs_dir, start_id).path, whole=True))
        start = LoraDelta.of(adapters[-1])
    return Ready(found, adapters, base, start_id, Merge(updates, weights, how.method, how.options, start))


def ranks(job: Merge, how: How) -> tuple[int | None, int]:
    """The rank to cut to, if any, and the one to fill up to with zeros."""
    rank = job.smallest_rank(how.keep) if how.keep else how.rank
    if not how.fit:
        return rank, 0
    return rank, merge.fitting(how.fit, max(merged.factors.rank for merged in job.modules(rank)))


def told(run: Run) -> str:
    """A mix in one line."""
    left_out = run.manifest.metrics["left_out"]
    size = sum(file["bytes"] for file in run.manifest.files.values()) / 1e6
    cut = left_out > 0 or run.manifest.method["asked_rank"]
    kept = f", {left_out:.2%} of its energy left out" if cut else ""
    start = ", with the start adapter" if run.manifest.contains_start else ""
    return f"{run.path}  rank {run.manifest.method['rank']}{kept}{start}, {size:.1f} MB"


def default_name(weights: Mapping[str, float]) -> str:
    """`helpful1_harmless0p5`: readable, and a name that may be a folder's."""
    parts = []
    for key, weight in weights.items():
        number = f"{weight:g}".replace("-", "m").replace(".", "p").replace("+", "")
        parts.append(Path(key).name + number)
    return name_of(parts) or "mix"


def _start(runs_dir: Path, identity: str) -> Run:
    run = start_policy.published(runs_dir, identity)
    if run is None:
        folder = start_policy.folder(runs_dir)
        raise UserError(
            f"the vectors stand on a start adapter that is not in {folder}; bring it back, or --without-start"
        )
    run.check_files()
    return run


def _base_known(vector: Vector) -> bool:
    """Whether manifests say what base all of it stands on; a folder from elsewhere has a name and shapes at best."""
    return all(parent.run and parent.run.fingerprint for parent in vector.parents)


def _lineage(vector: Vector, weight: float) -> dict[str, Any]:
    return {"name": vector.name, "weight": weight, "adapters": [parent.lineage() for parent in vector.parents]}

"""A mix: the start adapter plus weighted vectors, published as one ordinary adapter. No base is loaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.adapters import merge, peft_format, vectors
from lora_align.adapters.vectors import Vector
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.recipe import Recipe
from lora_align.runs import Manifest, Run
from lora_align.stages import start as start_policy


def run(
    weights: Mapping[str, float],
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    out: Path | None = None,
    rank: int | None = None,
    with_start: bool = True,
    force: bool = False,
) -> Run:
    """Add up, compress if asked, and publish."""
    found = {key: vectors.find(key, runs_dir, recipe.preferences) for key in weights}
    target = out or runs_dir / "mix" / (name or default_name(weights))
    keep_both = "another --out keeps both" if out else "--name NEW keeps both"
    runs.refuse_existing(target, force, keep_both)
    vectors.refuse_start_inside(found.values(), with_start)
    base, start_id = vectors.common(found.values())
    if base and not out:
        runs.check_base(runs_dir, base)
    for vector in found.values():
        for doubt in vector.doubts():
            screen.warn(doubt)

    parts = {key: vector.load() for key, vector in found.items()}
    folders = [parent.folder for vector in found.values() for parent in vector.parents]
    factors = dict(weights)
    if start_id and with_start:
        start = _start(runs_dir, start_id)
        parts[str(start.path)], factors[str(start.path)] = peft_format.load(start.path), 1.0
        folders.append(start.path)
    merged = merge.exact(parts, factors, rank)
    with runs.claim(target, screen, force=force) as staging:
        config = peft_format.read_config(folders[0])
        named, revision = config.get("base_model_name_or_path") or "", config.get("revision") or ""
        endings = peft_format.common_endings(folders)
        peft_format.save(merged.delta, staging, base=named, revision=revision, targets=endings)
        manifest = Manifest(
            stage="mix",
            base=base or {"model": named, "fingerprint": "", "note": "no parent has a manifest"},
            recipe=recipe.as_dict(),
            contains_start=bool(start_id and with_start),
            start=start_id,
            parents=tuple(_lineage(vector, weights[key]) for key, vector in found.items()),
            method={"name": "exact", "weights": dict(weights), "rank": merged.delta.rank, "asked_rank": rank},
            metrics={"norm": merged.delta.norm(), "left_out": merged.left_out},
            unconverged=tuple(why for vector in found.values() for why in vector.unconverged()),
        )
        return runs.publish(staging, target, manifest)


def told(run: Run) -> str:
    """A mix in one line."""
    left_out = run.manifest.metrics["left_out"]
    size = sum(file["bytes"] for file in run.manifest.files.values()) / 1e6
    kept = f", {left_out:.2%} of its energy left out" if run.manifest.method["asked_rank"] else ""
    start = ", with the start adapter" if run.manifest.contains_start else ""
    return f"{run.path}  rank {run.manifest.method['rank']}{kept}{start}, {size:.1f} MB"


def default_name(weights: Mapping[str, float]) -> str:
    """`helpful1_harmless0p5`: readable, and a name that may be a folder's."""
    parts = []
    for key, weight in weights.items():
        number = f"{weight:g}".replace("-", "m").replace(".", "p").replace("+", "")
        parts.append(re.sub(r"[^a-z0-9_-]+", "-", Path(key).name.lower()) + number)
    return re.sub(r"^[^a-z0-9]+", "", "_".join(parts))[:64] or "mix"


def _start(runs_dir: Path, identity: str) -> Run:
    run = start_policy.published(runs_dir, identity)
    if run is None:
        folder = start_policy.folder(runs_dir)
        raise UserError(
            f"the vectors stand on a start adapter that is not in {folder}; bring it back, or --without-start"
        )
    run.check_files()
    return run


def _lineage(vector: Vector, weight: float) -> dict[str, Any]:
    return {"name": vector.name, "weight": weight, "adapters": [parent.lineage() for parent in vector.parents]}

"""A mix: the start adapter plus weighted vectors, published as one ordinary adapter. No base is loaded."""

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
    runs.refuse_existing(target, force)
    base, start_id = vectors.common(found.values())
    if base and not out:
        runs.check_base(runs_dir, base)
    for doubt in (doubt for vector in found.values() for doubt in vector.doubts()):
        screen.warn(doubt)
    _refuse_nested_start(found, with_start)

    merged = merge.exact({key: vector.load() for key, vector in found.items()}, weights, rank)
    start = _start(runs_dir, start_id) if start_id and with_start else None
    delta = merged.delta + peft_format.load(start.path) if start else merged.delta
    folders = [parent.folder for vector in found.values() for parent in vector.parents]
    with runs.claim(target, screen, force=force) as staging:
        named = peft_format.read_config(folders[0]).get("base_model_name_or_path") or ""
        peft_format.save(delta, staging, base=named, targets=peft_format.common_endings(folders))
        manifest = Manifest(
            stage="mix",
            base=base or {"model": named, "fingerprint": "", "note": "no parent has a manifest"},
            recipe=recipe.as_dict(),
            contains_start=start is not None,
            start=start_id,
            parents=tuple(_lineage(vector, weights[key]) for key, vector in found.items()),
            method={"name": "exact", "weights": dict(weights), "rank": delta.rank, "asked_rank": rank},
            metrics={"norm": merged.delta.norm(), "left_out": merged.left_out},
        )
        return runs.publish(staging, target, manifest)


def default_name(weights: Mapping[str, float]) -> str:
    """`helpful1_harmless0p5`: readable, and a name that may be a folder's."""
    parts = []
    for key, weight in weights.items():
        number = f"{weight:g}".replace("-", "m").replace(".", "p").replace("+", "")
        parts.append(Path(key).name + number)
    return "_".join(parts)[:64].lower()


def _start(runs_dir: Path, identity: str) -> Run:
    folder = start_policy.folder(runs_dir)
    run = runs.read(folder) if runs.is_run(folder) else None
    if start_policy.identity(run) != identity:
        raise UserError(
            f"the vectors stand on a start adapter that is not in {folder}; bring it back, or --without-start"
        )
    assert run is not None
    run.check_files()
    return run


def _refuse_nested_start(found: Mapping[str, Vector], with_start: bool) -> None:
    for vector in found.values():
        for parent in vector.known_runs():
            if parent.manifest.stage != "sft" and parent.manifest.contains_start:
                raise UserError(
                    f"{parent.path} already contains the start adapter, and its weight would scale that too; "
                    "merge from preferences, or make it again --without-start"
                )
            if parent.manifest.stage == "sft" and with_start:
                raise UserError(f"{parent.path} is the start adapter; it is added to every mix, with weight 1")


def _lineage(vector: Vector, weight: float) -> dict[str, Any]:
    return {"name": vector.name, "weight": weight, "adapters": [parent.lineage() for parent in vector.parents]}

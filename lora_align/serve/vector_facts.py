"""Facts about the vectors that the page shows: norms, angles, safe weights, and points of a sweep."""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_align import runs
from lora_align.policy import safe_ranges
from lora_align.serve.catalogue import SWEEP, Catalogue, Known

POINTS = "points.json"  # of a sweep


def facts(catalogue: Catalogue) -> dict[str, Any]:
    """Return the content of /v1/vectors."""
    known, ids = catalogue.known(), catalogue.ids()
    norms: dict[str, float] = {}
    cosines: dict[str, dict[str, float | None]] = {}
    if known.vectors and (geometry := catalogue.geometry(known)).names:
        norms = geometry.norms()
        for name, row in zip(geometry.names, geometry.cosines(), strict=True):
            cosines[name] = {other: _number(value) for other, value in zip(geometry.names, row, strict=True)}
    default = catalogue.default
    return {
        "content": catalogue.content(),
        "base": catalogue.base.recipe.model,
        "default": {
            "model": default.name,
            "weights": {} if catalogue.fixed else dict(default.weights),
            "fixed": catalogue.fixed,
        },
        "vectors": [
            {
                "id": ids[name],
                "name": name,
                "norm": norms[name],
                "safe": _safe(catalogue, known, name),
                "cosines": cosines[name],
                "warnings": vector.warnings(),
            }
            for name, vector in known.vectors.items()
            if name in norms
        ],
        "conditioned": {
            name: {
                "objectives": run.manifest.method["objectives"],
                "directions": run.manifest.recipe["rsf"]["directions"],
            }
            for name, run in known.conditioned.items()
        },
        "map": _map(catalogue, known),
    }


def _safe(catalogue: Catalogue, known: Known, name: str) -> dict[str, Any] | None:
    """Return the safe weights of a vector, if `reach` has measured them."""
    found = None
    with catalogue.skipping():
        found = safe_ranges.measured(known.vectors[name], catalogue.runs_dir)
    if found is None:
        return None
    reach, run = found
    return {
        "low": 0.0 - reach.down.to,
        "high": reach.up.to,
        "breaks": {"low": reach.down.breaks, "high": reach.up.breaks},
        "measured": run.manifest.created,
    }


def _map(catalogue: Catalogue, known: Known) -> dict[str, Any] | None:
    """Return the points of the newest sweep over two vectors: their weights and scores."""
    for run in reversed(runs.list_runs(catalogue.runs_dir / SWEEP)):
        axes = list(run.manifest.method.get("axes", {}))
        if len(axes) == 2 and set(axes) <= known.vectors.keys():
            try:
                rows = json.loads((run.path / POINTS).read_text(encoding="utf-8"))
                scores = run.manifest.metrics["scores"]
                points = [_point(row, axes, scores) for row in rows if row["weights"]]
            except (OSError, ValueError, KeyError, TypeError) as fault:
                catalogue.report(f"{run.path / POINTS}: damaged ({fault}); run `sweep` again")
                continue
            return {"axes": axes, "scores": scores, "points": points}
    return None


def _point(row: Mapping[str, Any], axes: list[str], scores: Mapping[str, str]) -> dict[str, Any]:
    figures = row["figures"]
    return {
        "weights": [row["weights"].get(axis, 0.0) for axis in axes],
        "scores": {name: figures[name]["value"] for name in scores.values() if name in figures},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

"""The laptop recipe on a GGUF file and on split rows, instead of a base and data from the hub."""

from pathlib import Path
from typing import Any, Literal

import splits

import lora_align as la

Split = Literal["train", "development"]
PAIRS = {"helpful": "ultrafeedback"} | dict.fromkeys(("harmless", "cautious", "brief"), "hh-harmless")
HERE = {"split": "train", "subset": ""}  # a file has no other split
SCORES = {f"score_{side}": f"metadata.score_{side}" for side in ("chosen", "rejected")}


def project(base: str, folder: Path, runs: Path, split: Split = "train", /, **tables: Any) -> la.Project:
    """Return the recipe smollm2-135m with this base and the rows of a split. `tables` override further keys."""
    data = {source: str(splits.file_of(folder, source, split)) for source in ("hh-harmless", "ultrafeedback", "xstest")}
    prompts = {"data": data["xstest"]}
    rated = {"data": data["ultrafeedback"], **HERE}
    settings: dict[str, Any] = {
        "base": {"model": base},
        "preferences": {name: {"data": data[source], **HERE} for name, source in PAIRS.items()},
        "reward": {"ratings": {"ultrafeedback": {**rated, "columns": SCORES}}},
        "rsf": rated,
        "eval": {"prompts": prompts, "risky": prompts},
    }
    for name, table in tables.items():
        settings[name] = {**settings.get(name, {}), **table}
    return la.Project("smollm2-135m", runs, quiet=True, **settings)

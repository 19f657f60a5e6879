"""The laptop recipe on a GGUF file and on split rows, instead of a base and data from the hub."""

import json
from pathlib import Path
from typing import Any, Literal

import splits

import lora_align as la

Split = Literal["train", "development"]
PAIRS = {"helpful": "ultrafeedback"} | dict.fromkeys(("harmless", "cautious", "brief"), "hh-harmless")
HERE = {"split": "train", "subset": ""}  # a file has no other split
TEXTS = 20  # chosen answers of UltraFeedback's development pairs
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


def texts(folder: Path, work: Path) -> Path:
    """Write the ordinary texts whose loss is measured, and return their file."""
    file, source = work / "texts.jsonl", splits.file_of(folder, "ultrafeedback", "development")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:TEXTS]]
    chosen = [row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"] for row in rows]
    file.write_text("".join(json.dumps({"text": text[:1500]}) + "\n" for text in chosen))
    return file

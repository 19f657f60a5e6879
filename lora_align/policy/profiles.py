"""Profiles: the weights that a person prefers, as a file that can be edited. Nothing is sent anywhere."""

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_align import runs, store
from lora_align.errors import UserError, nearest
from lora_align.mix_weights import NAME, parse_weights

FOLDER = "profiles"  # in the runs folder
PREFIX = "profile:"  # of a model's name on the server


def path(name: str, runs_dir: Path) -> Path:
    """Return the file of a profile."""
    return runs_dir / FOLDER / f"{name}.json"


def save(name: str, runs_dir: Path, content: Mapping[str, Any]) -> Path:
    """Write a profile. An earlier one of that name is copied to NAME.old."""
    file = path(name, runs_dir)
    if file.is_file():
        shutil.copyfile(file, file.with_suffix(".old"))  # the profile itself stays until the new one is complete
    text = json.dumps({**content, "made": datetime.now(UTC).isoformat(timespec="seconds")}, indent=2) + "\n"
    with store.report_write_errors(file.parent, "make room, and run the command again"), store.new_file(file) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return file


def names(runs_dir: Path) -> list[str]:
    """Return the names of all profiles."""
    return sorted(file.stem for file in (runs_dir / FOLDER).glob("*.json") if NAME.fullmatch(file.stem))


def weights(name: str, runs_dir: Path) -> dict[str, float]:
    """Return the weights of a profile: the means of its intervals, or the numbers that were written by hand."""
    file, known = path(name, runs_dir), names(runs_dir)
    if name not in known:
        command = runs.command(f"prefer --profile {name}", runs_dir)
        listed = ", ".join(known) or "none"
        raise UserError(f"no profile {name!r}{nearest(name, known)} (known: {listed}); `{command}` makes one")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["weights"]
        values = {key: of["mean"] if isinstance(of, Mapping) else of for key, of in stored.items()}
        return parse_weights(",".join(f"{key}={float(value)!r}" for key, value in values.items()))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        UserError,
    ) as fault:
        raise UserError(
            f'{file}: {fault}; expected {{"weights": {{"helpful": 0.5}}}}, or make the profile again'
        ) from fault

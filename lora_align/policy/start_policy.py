"""The start policy: the base, plus the SFT adapter if the recipe has one."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.errors import UserError
from lora_align.model.mixer import Mixer
from lora_align.recipe import Recipe
from lora_align.runs import Run

if TYPE_CHECKING:  # not imported at run time: `merge` uses this module without the base
    from transformers import PreTrainedModel

    from lora_align.model.base import Base

NAME = "start"  # of the update, and of the policy


def folder(runs_dir: Path) -> Path:
    """Return the folder in which `sft` publishes the start adapter."""
    return runs_dir / "sft" / NAME


def adapter(recipe: Recipe, runs_dir: Path) -> Run | None:
    """Return the run of the start adapter; None if the recipe has no SFT."""
    if recipe.sft is None:
        return None
    if not runs.is_run(folder(runs_dir)):
        command = runs.command("sft", runs_dir)
        raise UserError(f"{folder(runs_dir)} does not exist, and the recipe starts from SFT: run `{command}` first")
    return runs.read(folder(runs_dir))


def published(runs_dir: Path, wanted: str) -> Run | None:
    """Return the published start adapter, if it has the identity `wanted`."""
    run = runs.read(folder(runs_dir)) if runs.is_run(folder(runs_dir)) else None
    return run if run is not None and identity(run) == wanted else None


def identity(start: Run | None) -> str:
    """Return the hash that names the start adapter in manifests; empty for the bare base."""
    return str(start.manifest.files[peft_format.WEIGHTS]["sha256"]) if start else ""


def load(base: "Base", start: Run | None) -> "PreTrainedModel":
    """Load the start policy. Its weights are frozen; trainers add one adapter to it."""
    model = base.load()
    if start is not None:
        start.refuse_other_base(base.fingerprint)
        start.check_files()
        Mixer(model, {NAME: peft_format.load(start.path, whole=True)}, {NAME: 1.0})
    return model

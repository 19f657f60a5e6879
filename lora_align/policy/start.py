"""The start policy: the 4-bit base, and the SFT adapter under everything else where the recipe has one."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.errors import UserError
from lora_align.model.mixer import Mixer
from lora_align.recipe import Recipe
from lora_align.runs import Run

if TYPE_CHECKING:  # mixing needs to know the start adapter and no base
    from transformers import PreTrainedModel

    from lora_align.model.base import Base

NAME = "start"


def folder(runs_dir: Path) -> Path:
    """Where `sft` publishes the start policy's adapter."""
    return runs_dir / "sft" / NAME


def adapter(recipe: Recipe, runs_dir: Path) -> Run | None:
    """The run a recipe's start policy needs; None where the base alone is the start."""
    if recipe.sft is None:
        return None
    if not runs.is_run(folder(runs_dir)):
        command = runs.command("sft", runs_dir)
        raise UserError(f"the recipe starts from SFT and {folder(runs_dir)} does not exist yet: run `{command}`")
    return runs.read(folder(runs_dir))


def published(runs_dir: Path, wanted: str) -> Run | None:
    """The start adapter of that identity, if it is still where `sft` put it."""
    run = runs.read(folder(runs_dir)) if runs.is_run(folder(runs_dir)) else None
    return run if run is not None and identity(run) == wanted else None


def identity(start: Run | None) -> str:
    """Names the start adapter in the manifests of what stands on it; empty for the bare base."""
    return str(start.manifest.files[peft_format.WEIGHTS]["sha256"]) if start else ""


def load(base: "Base", start: Run | None) -> "PreTrainedModel":
    """The start policy. Trainers put their one adapter on top and see everything below as frozen."""
    model = base.load()
    if start is not None:
        if start.fingerprint != base.fingerprint:
            raise UserError(f"{start.path} was trained on another base ({start.fingerprint[:12]})")
        start.check_files()
        Mixer(model, {NAME: peft_format.load(start.path, whole=True)}, {NAME: 1.0})
    return model

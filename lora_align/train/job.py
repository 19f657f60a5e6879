"""A training job (base, settings, LoRA shape, rows, loss), and the run folder that it fills."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from lora_align import run_writer
from lora_align.console import Screen, library_log
from lora_align.model.base import Base
from lora_align.model.logprobs import Reader
from lora_align.recipe import Lora, Training
from lora_align.runs import LOG, Manifest, Run
from lora_align.train import checkpoints
from lora_align.train.checkpoints import Checkpoints
from lora_align.train.stepper import Loss, StepInputs, StepTrainer

Row = TypeVar("Row")


@dataclass(frozen=True)
class Job(Generic[Row]):
    """A training job: the base, the settings, the LoRA shape, the rows, the loss and the trainer."""

    base: Base
    settings: Training
    lora: Lora
    rows: Sequence[Row]
    loss: Callable[[PreTrainedModel, Reader], Loss[Row]]
    trainer: Callable[[PreTrainedModel, Base, Lora, dict[str, Any], StepInputs[Row]], StepTrainer[Row]]


@dataclass(frozen=True)
class Target:
    """The run that a job publishes: its folder, its label in messages, and the options --force and --resume."""

    path: Path
    label: str
    screen: Screen
    force: bool = False
    resume: bool = False

    def refuse_existing(self, remedy: str = "--name NEW keeps both") -> None:
        """Refuse a run that is being written, or that exists if there is no --resume or --force.

        Call this before slow work.
        """
        run_writer.refuse_before_training(self.path, force=self.force, resume=self.resume, remedy=remedy)

    def checkpoints(self, identity: Mapping[str, Any]) -> Checkpoints:
        """Return the checkpoints of this run; refuse those of another identity."""
        return Checkpoints.of(self.path, identity, resume=self.resume, force=self.force, screen=self.screen)

    def find_published(self, saved: Checkpoints) -> Run | None:
        """Return the run if --resume finds it published, else None."""
        return saved.find_published(self.path, self.screen) if self.resume else None

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """Lock the run and yield a staging folder. Log messages of libraries go to a file in this folder."""
        force = self.force or (self.resume and checkpoints.has_newer_checkpoints(self.path))
        with run_writer.staging_folder(self.path, self.screen, force=force) as staging, library_log(staging / LOG):
            yield staging

    def publish(self, staging: Path, manifest: Manifest) -> Run:
        """Publish the run, delete its checkpoints, and warn if it diverged or did not converge."""
        run = run_writer.publish(staging, self.path, manifest)
        shutil.rmtree(checkpoints.checkpoint_folder(self.path), ignore_errors=True)
        for reason in manifest.unconverged:
            self.screen.warn(run.doubt(reason))
        return run

    def note(self, text: str) -> None:
        self.screen.note(f"{self.label}: {text}")

    def warn(self, text: str) -> None:
        self.screen.warn(f"{self.label}: {text}")

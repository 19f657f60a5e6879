"""Compute an optimizer step in parts that fit into memory; this replaces the step of TRL's and transformers' trainers.

A trainer hands over the rows of a whole optimizer step. They are sorted by length and computed in parts of at most
`tokens_per_batch` tokens. Each part's loss is normalised by the whole step, so the split changes a result only by
rounding. If memory runs out, the step starts again with half as many tokens per part.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lora_align import distributed
from lora_align.errors import RunFailedError
from lora_align.model.base import base_model_of
from lora_align.model.fsdp import is_sharded, keep_in_step
from lora_align.model.logprobs import Reader, batches_by_length
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train.checkpoints import PREFIX, Checkpoints

Row = TypeVar("Row")
RowIn = TypeVar("RowIn", contravariant=True)
Figures = Mapping[str, tuple[Tensor, float]]  # name → sum and count
Summed = tuple[float, dict[str, tuple[float, float]]]  # a loss, and figures
QUOTED = 3  # rows that an error quotes
METRICS = "metrics.jsonl"
TRAINED, COUNTERS = "trained.safetensors", "seen.json"  # files of a checkpoint: trained tensors; tokens seen, budget


@dataclass(frozen=True)
class PartLoss:
    """The contribution of some rows to a step's loss, and figures about these rows."""

    loss: Tensor
    figures: Figures


class Loss(Protocol[RowIn]):
    """A loss that is a sum over rows, normalised over the whole step."""

    @property
    def reader(self) -> Reader: ...

    def length(self, row: RowIn) -> int:
        """Return the tokens of a row."""

    def weights(self, rows: Sequence[RowIn]) -> list[float]:
        """Return the normalisers of the loss's terms over all rows of a step, for example the number of rows."""

    def part(self, rows: Sequence[RowIn], weights: Sequence[float]) -> PartLoss:
        """Return the loss of some rows, divided by the whole step's `weights`."""

    def excerpt(self, row: RowIn) -> str:
        """Return the first words of a row, for error messages."""


@dataclass(frozen=True)
class StepInputs(Generic[Row]):
    """The loss, the rows, the memory budget and the checkpoints of a training, which TRL's trainers do not know."""

    loss: Loss[Row]
    rows: Sequence[Row]
    budget: MemoryBudget
    checkpoints: Checkpoints
    note: Callable[[str], None]


class StepTrainer(Trainer, Generic[Row]):
    """A mixin to list before a trainer's class: it computes the steps; the trainer has the loop, optimizer and log."""

    model: PeftModel

    def __init__(self, steps: StepInputs[Row], **settings: Any) -> None:
        rows, args = steps.rows, settings["args"]
        if args.n_gpu > 1:  # transformers would multiply the batch by the visible GPUs, and use DataParallel
            args._n_gpu = 1
        self.loss, self.budget, self.checkpoints, self.note = steps.loss, steps.budget, steps.checkpoints, steps.note
        self.seen: dict[str, list[float]] = {}  # sum and count of each figure since the last log line
        self.tokens_seen = 0
        self.rows_each_epoch, self.warmup_added = len(rows), False
        super().__init__(
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            data_collator=lambda batch: {"rows": [rows[entry["row"]] for entry in batch]},
            **settings,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a dataloader that gives every rank the same rows.

        accelerate would shard the rows, and repeat some to fill the last step.
        """
        sampler = self._get_train_sampler()
        assert self.train_dataset is not None
        loader = DataLoader(
            self.train_dataset, self.args.per_device_train_batch_size, sampler=sampler, collate_fn=self.data_collator
        )
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True
        )
        return prepared

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """Return the dataset as it is, because rows are tokenised already."""
        return dataset

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return transformers' schedule, with a warm-up that starts above 0: a step at rate 0 trains nothing."""
        made = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and not self.warmup_added and isinstance(made, LambdaLR):
            later, self.warmup_added = made.lr_lambdas[0], True
            made = self.lr_scheduler = LambdaLR(
                made.optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else later(step)
            )
        return made

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> Tensor:
        """Compute the gradients of an optimizer step, summed over parts and ranks, and return its loss."""
        rows: Sequence[Row] = inputs["rows"]
        lengths = [self.loss.length(row) for row in rows]
        model.train()
        mine, weights = [rows[i] for i in rows_of_process(lengths)], self.loss.weights(rows)
        summed = distributed.on_all_ranks(lambda: self._backward(model, mine, weights))
        self._reduce_gradients(model, rows, weights)
        self.tokens_seen += sum(lengths)
        losses, figures = zip(*summed, strict=True)
        for rank_figures in figures:
            for name, (total, count) in rank_figures.items():
                sums = self.seen.setdefault(name, [0.0, 0.0])
                sums[0] += total
                sums[1] += count
        return torch.tensor(sum(losses), device=self.args.device)

    def _backward(self, model: nn.Module, rows: Sequence[Row], weights: Sequence[float]) -> Summed:
        """Compute the gradients of this rank's rows. Halve the memory budget until the parts fit."""
        lengths = [self.loss.length(row) for row in rows]
        while True:
            before = self.budget.size
            with keep_in_step(self.accelerator.unwrap_model(model), training=True):
                summed = self.budget.attempt(
                    lambda budget: self._backward_in_parts(rows, lengths, weights, budget), max(lengths, default=1)
                )
            if summed is not None:
                return summed
            model.zero_grad()  # some parts have already added their gradients
            self.note(f"memory ran out at {before:,} tokens at once; continuing with {self.budget.size:,}")

    def _backward_in_parts(
        self, rows: Sequence[Row], lengths: Sequence[int], weights: Sequence[float], budget: int
    ) -> Summed:
        loss, figures = 0.0, dict[str, tuple[float, float]]()
        for picked in batches_by_length(lengths, budget):
            some = [rows[i] for i in picked]
            with self.accelerator.autocast():
                part = self.loss.part(some, weights)
            value = float(part.loss.detach())
            if not math.isfinite(value):
                raise self._not_finite("loss", some, weights)
            self.accelerator.backward(part.loss)
            loss += value
            for name, (total, count) in part.figures.items():
                before = figures.get(name, (0.0, 0.0))
                figures[name] = (before[0] + float(total), before[1] + count)
        return loss, figures

    def _reduce_gradients(self, model: nn.Module, rows: Sequence[Row], weights: Sequence[float]) -> None:
        """All-reduce gradients by sum (losses are already normalised globally), then check that they are finite."""
        if distributed.world_size() > 1:
            for _, parameter in trainable(model):
                if parameter.grad is None:  # a step with fewer rows than ranks
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not self.args.fp16 and not get_total_norm(gradients).isfinite():  # fp16's scaler skips such steps
            raise self._not_finite("gradient", rows, weights)

    def _not_finite(self, what: str, rows: Sequence[Row], weights: Sequence[float]) -> RunFailedError:
        bad_rows = self._not_finite_rows(rows, weights)
        excerpts = "; ".join(self.loss.excerpt(row) for row in bad_rows[:QUOTED])
        more = f" and {len(bad_rows) - QUOTED} more" if len(bad_rows) > QUOTED else ""
        return RunFailedError(
            f"step {self.state.global_step + 1}: the {what} is not finite, so the run stopped before the update; lower "
            f"learning_rate, or check these rows: {excerpts}{more}"
        )

    def _not_finite_rows(self, rows: Sequence[Row], weights: Sequence[float]) -> Sequence[Row]:
        """Return the rows whose own loss or gradient is not finite, or all rows if there is no such row.

        With a sharded base all rows are returned, because the other ranks do not repeat the pass.
        """
        if is_sharded(base_model_of(self.model)):
            return rows
        bad_rows = []
        for row in rows:
            self.model.zero_grad()
            with self.accelerator.autocast():
                loss = self.loss.part([row], weights).loss
            loss.backward()
            norm = get_total_norm([p.grad for _, p in trainable(self.model) if p.grad is not None])
            if not (loss.isfinite() and norm.isfinite()):
                bad_rows.append(row)
        return bad_rows or rows

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint completely or not at all. transformers may leave a partial one."""
        step = self.state.global_step
        staging = self.checkpoints.folder / f".{PREFIX}{step}.staging"
        if self.args.should_save:
            self.checkpoints.make_staging(staging)
        self.accelerator.wait_for_everyone()
        try:
            if self.args.should_save:
                tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(self.model)}
                save_file(tensors, staging / TRAINED)
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
                counters = {"tokens": self.tokens_seen, "budget": self.budget.size, "whole": self.budget.whole}
                (staging / COUNTERS).write_text(json.dumps(counters))
                if self.metrics_file.exists():
                    shutil.copyfile(self.metrics_file, staging / self.metrics_file.name)
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.checkpoints.add(staging, step)
        except (OSError, RuntimeError, SafetensorError) as fault:
            raise self.checkpoints.write_error(staging, fault) from fault

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the trained tensors in float32. transformers' loop loads the rest of the folder."""
        folder = Path(resume_from_checkpoint)
        tensors = load_file(folder / TRAINED)
        with torch.no_grad():
            for name, parameter in trainable(self.model):
                parameter.copy_(tensors[name])
        seen = json.loads((folder / COUNTERS).read_text())
        self.tokens_seen = seen["tokens"]
        if seen["budget"] < seen["whole"]:  # memory ran out before the stop
            self.budget.size = min(self.budget.size, seen["budget"])

    def restore(self, folder: Path) -> None:
        """Load the checkpoint of the last step, after which nothing is left to train."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

    @property
    def metrics_file(self) -> Path:
        """Return the path of metrics.jsonl, which has one line per step."""
        return Path(str(self.args.output_dir)).parent / METRICS

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """Log the trainer's figures, and the means of the loss's figures since the last line."""
        if "loss" in logs:
            logs |= {name: total / count for name, (total, count) in self.seen.items() if count}
            logs["num_tokens"] = float(self.tokens_seen)
            self.seen.clear()
        super().log(logs, *args, **settings)


def with_padding(loss: Loss[Row]) -> Loss[Row]:
    """Return the same loss with a reader that pads rows."""
    return replace(loss, reader=loss.reader.padded())  # type: ignore[type-var]


def rows_of_process(lengths: Sequence[int]) -> Sequence[int]:
    """Return the indices of this rank's rows in a step. Every rank gets long and short rows."""
    if distributed.world_size() == 1:
        return range(len(lengths))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return order[distributed.rank() :: distributed.world_size()]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and parameters that require gradients."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

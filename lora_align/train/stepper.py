"""One optimiser step in parts that fit into memory: what all training has in common.

A trainer hands over a whole optimiser batch. Its rows are sorted by length and computed some at a time, as many as stay
under a number of tokens; each part's loss is its share of the whole step's, so that how a batch is parted changes
nothing but rounding. Where memory runs out, the step is begun anew with half as many tokens.
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

from lora_align import processes
from lora_align.errors import RunFailedError
from lora_align.model.base import base_model_of
from lora_align.model.fsdp import in_step, is_sharded
from lora_align.model.logprobs import Reader, parts
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train.checkpoints import PREFIX, Unfinished

Row = TypeVar("Row")
RowIn = TypeVar("RowIn", contravariant=True)
Figures = Mapping[str, tuple[Tensor, float]]  # name → sum and count
Summed = tuple[float, dict[str, tuple[float, float]]]  # a loss, and figures
NAMED = 3  # rows that an error quotes
METRICS = "metrics.jsonl"
TRAINED, SEEN = "trained.safetensors", "seen.json"  # of a checkpoint


@dataclass(frozen=True)
class Part:
    """The share of a step's loss that some of its rows have, and figures about them."""

    loss: Tensor
    figures: Figures


class Loss(Protocol[RowIn]):
    """What is learned from rows."""

    @property
    def reader(self) -> Reader:
        """How rows go through the base."""

    def length(self, row: RowIn) -> int:
        """Tokens that a row takes."""

    def weights(self, rows: Sequence[RowIn]) -> list[float]:
        """What the parts of its loss are divided by, over all rows of a step: their number, or their tokens."""

    def part(self, rows: Sequence[RowIn], weights: Sequence[float]) -> Part:
        """The loss of some rows, divided by what `weights` found of the whole step."""

    def quoted(self, row: RowIn) -> str:
        """How a row begins, for a person to find it by."""


class StepTrainer(Trainer, Generic[Row]):
    """Put before a trainer's class: its loop, optimiser and records, and steps made here."""

    model: PeftModel
    objective: Loss[Row]

    def __init__(
        self,
        *,
        objective: Loss[Row],
        rows: Sequence[Row],
        room: MemoryBudget,
        unfinished: Unfinished,
        tell: Callable[[str], None],
        **settings: Any,
    ) -> None:
        self.objective, self.room = objective, room
        self.unfinished, self.tell = unfinished, tell
        self.seen: dict[str, list[float]] = {}  # figures since the last line: sum and count
        self.tokens_seen = 0
        self.rows_each_epoch, self.warm = len(rows), False
        super().__init__(
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            data_collator=lambda batch: {"rows": [rows[entry["row"]] for entry in batch]},
            **settings,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of a step, the same for every process; accelerate would fill a last step up with others."""
        sampler = self._get_train_sampler()
        assert self.train_dataset is not None
        loader = DataLoader(
            self.train_dataset, self.args.train_batch_size, sampler=sampler, collate_fn=self.data_collator
        )
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True
        )
        return prepared

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """TRL's would tokenise; rows are token ids already."""
        return dataset

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """transformers' schedule with a warm-up that begins above a rate of 0, at which a step trains nothing."""
        made = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and not self.warm and isinstance(made, LambdaLR):
            later, self.warm = made.lr_lambdas[0], True
            made = self.lr_scheduler = LambdaLR(
                made.optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else later(step)
            )
        return made

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> Tensor:
        """Gradients of a whole optimiser batch, summed over its parts and over processes."""
        rows: Sequence[Row] = inputs["rows"]
        lengths = [self.objective.length(row) for row in rows]
        model.train()
        mine, weights = [rows[i] for i in rows_of_process(lengths)], self.objective.weights(rows)
        summed = processes.on_all_ranks(lambda: self._computed(model, mine, weights))
        self._reduce_gradients(model, rows, weights)
        self.tokens_seen += sum(lengths)
        losses, figures = zip(*summed, strict=True)
        for found in figures:
            for name, (total, count) in found.items():
                kept = self.seen.setdefault(name, [0.0, 0.0])
                kept[0] += total
                kept[1] += count
        return torch.tensor(sum(losses), device=self.args.device)

    def _computed(self, model: nn.Module, rows: Sequence[Row], weights: Sequence[float]) -> Summed:
        """Gradients of this process's rows, with as much at once as memory bears."""
        lengths = [self.objective.length(row) for row in rows]
        while True:
            before = self.room.size
            with in_step(self.accelerator.unwrap_model(model), learning=True):
                found = self.room.attempt(
                    lambda budget: self._summed(rows, lengths, weights, budget), max(lengths, default=1)
                )
            if found is not None:
                return found
            model.zero_grad()  # nobody knows how much of it was summed
            self.tell(f"memory ran out at {before:,} tokens at once; going on with {self.room.size:,}")

    def _summed(self, rows: Sequence[Row], lengths: Sequence[int], weights: Sequence[float], budget: int) -> Summed:
        loss, figures = 0.0, dict[str, tuple[float, float]]()
        for picked in parts(lengths, budget):
            some = [rows[i] for i in picked]
            with self.accelerator.autocast():
                part = self.objective.part(some, weights)
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
        """Over processes: the sum, as every loss was divided by what all of them have. And a look whether it is one."""
        if processes.world_size() > 1:
            for _, parameter in trainable(model):
                if parameter.grad is None:  # of a step with fewer rows than there are processes
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not self.args.fp16 and not get_total_norm(gradients).isfinite():  # fp16 is scaled, and skips such steps
            raise self._not_finite("gradient", rows, weights)

    def _not_finite(self, what: str, rows: Sequence[Row], weights: Sequence[float]) -> RunFailedError:
        found = self._spoiling(rows, weights)
        quoted = "; ".join(self.objective.quoted(row) for row in found[:NAMED])
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return RunFailedError(
            f"step {self.state.global_step + 1}: the {what} is not finite; the run stops before the adapter is "
            f"spoilt: lower learning_rate, or look at the rows: {quoted}{more}"
        )

    def _spoiling(self, rows: Sequence[Row], weights: Sequence[float]) -> Sequence[Row]:
        """Those whose own loss or gradient is not finite; all of them, where none is by itself, or where the base is
        divided and the others do not go through it again."""
        if is_sharded(base_model_of(self.model)):
            return rows
        found = []
        for row in rows:
            self.model.zero_grad()
            with self.accelerator.autocast():
                loss = self.objective.part([row], weights).loss
            loss.backward()
            norm = get_total_norm([p.grad for _, p in trainable(self.model) if p.grad is not None])
            if not (loss.isfinite() and norm.isfinite()):
                found.append(row)
        return found or rows

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All that going on takes; by transformers' own means it would not be whole or nothing."""
        step = self.state.global_step
        staging = self.unfinished.folder / f".{PREFIX}{step}.staging"
        if self.args.should_save:
            self.unfinished.make_staging(staging)
        self.accelerator.wait_for_everyone()
        try:
            if self.args.should_save:
                tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(self.model)}
                save_file(tensors, staging / TRAINED)
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
                (staging / SEEN).write_text(json.dumps({"tokens": self.tokens_seen, "room": self.room.size}))
                if self.records.exists():
                    shutil.copyfile(self.records, staging / self.records.name)
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.unfinished.add(staging, step)
        except (OSError, RuntimeError, SafetensorError) as fault:
            raise self.unfinished.write_error(staging, fault) from fault

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The trained tensors, in the float32 they were; the loop reads the rest of the folder by itself."""
        folder = Path(resume_from_checkpoint)
        tensors = load_file(folder / TRAINED)
        with torch.no_grad():
            for name, parameter in trainable(self.model):
                parameter.copy_(tensors[name])
        seen = json.loads((folder / SEEN).read_text())
        self.tokens_seen, self.room.size = seen["tokens"], min(self.room.size, seen["room"])

    def take(self, folder: Path) -> None:
        """A checkpoint behind the last step, after which nothing is left to train."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

    @property
    def records(self) -> Path:
        """Where every step's figures are written."""
        return Path(str(self.args.output_dir)).parent / METRICS

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """With the means of what was found since the last line."""
        if "loss" in logs:
            logs |= {name: total / count for name, (total, count) in self.seen.items() if count}
            logs["num_tokens"] = float(self.tokens_seen)
            self.seen.clear()
        super().log(logs, *args, **settings)


def with_padding(objective: Loss[Row]) -> Loss[Row]:
    """Return the same objective, its rows padded."""
    return replace(objective, reader=objective.reader.padded())  # type: ignore[type-var]


def rows_of_process(lengths: Sequence[int]) -> Sequence[int]:
    """Which of a step's rows are this process's: each gets long ones and short ones."""
    if processes.world_size() == 1:
        return range(len(lengths))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return order[processes.rank() :: processes.world_size()]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimiser will move."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

"""Steps computed in parts: equal to TRL's loss, and robust to memory limits and values that are not finite."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from datasets import Dataset
from torch.optim import SGD
from transformers import get_scheduler
from trl import DPOConfig, DPOTrainer

from lora_align import recipe
from lora_align.console import Screen
from lora_align.errors import RunFailedError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.tokenise import TokenPair
from lora_align.recipe import Recipe
from lora_align.train import dpo, lora_trainer
from lora_align.train.checkpoints import Checkpoints
from lora_align.train.dpo import DpoStepTrainer
from lora_align.train.reference_cache import ReferenceCache
from lora_align.train.stepper import StepInputs
from support import fill, small_disk

QUIET = Screen(quiet=True)


def demo(*overrides: str) -> Recipe:
    return recipe.load(recipe.builtin()["demo"], ["dpo.limit=24", "lora.rank=8", *overrides])


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def pairs(base: Base) -> list[TokenPair]:
    material = dpo.prepare(demo(), "helpful", base, QUIET)
    return list(dpo.with_references(material, ReferenceCache.of(base, ""), base.load(), 4096, "reference", QUIET).train)


def trainer(base: Base, pairs: list[TokenPair], tokens: int, folder: Path, settings: Recipe) -> DpoStepTrainer:
    model, job = base.load(), dpo.dpo_job(settings.dpo, settings.lora, pairs, base)
    loss, unfinished = job.loss(model, Reader.of(model)), Checkpoints(folder / "unfinished", {})
    steps = StepInputs(loss, pairs, MemoryBudget(tokens), unfinished, lambda text: None)
    arguments = lora_trainer.arguments(settings.dpo, base, folder, "a test")
    made = cast(DpoStepTrainer, job.trainer(model, base, settings.lora, arguments, steps))
    lora_trainer.initialise(made.model, 0)
    with torch.no_grad():
        for name, parameter in lora_trainer.trainable(made.model):
            if "lora_B" in name:  # so that A has a gradient, too
                parameter.copy_(torch.linspace(-0.02, 0.02, parameter.numel()).view(parameter.shape))
    return made


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [("cosine", 0.03), ("linear", 4), ("constant_with_warmup", 4), ("cosine", 100), ("cosine", 0)],
)
def test_warmup_starts_above_zero_and_ends_at_transformers_schedule(
    schedule: str, warmup: float, base: Base, pairs: list[TokenPair], tmp_path: Path
) -> None:
    made = trainer(base, pairs, 4096, tmp_path, demo(f'dpo.schedule="{schedule}"', f"dpo.warmup={warmup}"))
    steps, ramp = 12, made.args.get_warmup_steps(12)
    made.create_optimizer()
    scheduler = made.create_scheduler(steps, made.optimizer)
    assert made.create_scheduler(steps, made.optimizer) is scheduler
    theirs = get_scheduler(schedule, SGD([torch.zeros(1)], lr=made.args.learning_rate), ramp, steps)
    for step in range(steps):
        rate, [usual] = made.optimizer.param_groups[0]["lr"], theirs.get_last_lr()
        assert set(scheduler.get_last_lr()) == {rate}
        assert rate > 0
        assert rate == pytest.approx(made.args.learning_rate * (step + 1) / (ramp + 1) if step < ramp else usual)
        made.optimizer.step()
        theirs.optimizer.step()
        scheduler.step()
        theirs.step()


def test_a_step_has_batch_size_rows_whatever_gpus_are_visible(
    base: Base, pairs: list[TokenPair], tmp_path: Path
) -> None:
    made = trainer(base, pairs, 4096, tmp_path, demo("dpo.batch_size=4"))
    made.args._n_gpu = 2  # as transformers sets it on a machine with two GPUs
    assert len(next(iter(made.get_train_dataloader()))["rows"]) == 4


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for _, p in lora_trainer.trainable(model)])


def test_loss_and_gradient_equal_trl_for_every_split_of_a_step(
    base: Base, pairs: list[TokenPair], tmp_path: Path
) -> None:
    settings = demo()
    ours = trainer(base, pairs, 4096, tmp_path, settings)
    steps = []
    for tokens in (4096, 200, 1):
        ours.budget = MemoryBudget(tokens)
        ours.model.zero_grad()
        loss = ours.training_step(ours.model, {"rows": pairs})
        steps.append((float(loss), gradients(ours.model)))

    model = base.load()
    trl = DPOTrainer(
        model=model,
        args=DPOConfig(
            beta=settings.dpo.beta,
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(pairs),
            max_length=128,
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=base.chat.tokenizer,
        peft_config=lora_trainer.adapter_config(settings.lora, base),
    )
    theirs = dict(trl.model.named_parameters())
    for name, parameter in lora_trainer.trainable(ours.model):
        theirs[name].data = parameter.data.clone()
    columns = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    trl.model.train()
    loss = trl.compute_loss(trl.model, trl.data_collator(columns))
    loss.backward()
    wanted = gradients(trl.model)
    for value, slope in steps:
        assert value == pytest.approx(float(loss), abs=2e-5)
        assert (slope - wanted).norm() < 1e-3 * wanted.norm()
        assert (slope - steps[0][1]).norm() < 1e-5 * wanted.norm()


def test_label_smoothing_averages_both_directions(base: Base, pairs: list[TokenPair], tmp_path: Path) -> None:
    """TRL's own option of that name does nothing to its default loss."""
    ours = trainer(base, pairs, 4096, tmp_path, demo())
    plain = ours.loss
    with torch.no_grad():
        losses = [plain.part(rows, [1.0]).loss for rows in (pairs, [pair.swap() for pair in pairs])]
        smoothed = dataclasses.replace(plain, smoothing=0.1).part(pairs, [1.0]).loss
    assert float(smoothed) == pytest.approx(0.9 * float(losses[0]) + 0.1 * float(losses[1]), rel=1e-6)
    assert abs(float(losses[0] - losses[1])) > 0.01


def test_out_of_memory_halves_the_budget_and_keeps_the_gradient(tmp_path: Path) -> None:
    """Under a limit on address space, in a process of its own."""
    program = """
import resource, sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from test_stepper import QUIET, ReferenceCache, bases, demo, dpo, gradients, recipe, trainer
from lora_align.errors import RunFailedError
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train import lora_trainer
base = bases.find(recipe.Base("demo"))
settings = demo("dpo.limit=160")
references = ReferenceCache.of(base, "")
material = dpo.prepare(settings, "helpful", base, QUIET)
pairs = list(dpo.with_references(material, references, base.load(), 4096, "reference", QUIET).train)
made = trainer(base, pairs, 1000, Path(sys.argv[1]), settings)
made.training_step(made.model, {"rows": pairs})
wanted = gradients(made.model)
notes = []
made.note, made.budget = notes.append, MemoryBudget(2**20)
made.model.zero_grad()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, resource.RLIM_INFINITY))
made.training_step(made.model, {"rows": pairs})
actual = gradients(made.model)
print(len(notes), made.budget.size, float((actual - wanted).norm() / wanted.norm()))
made.budget = MemoryBudget(2**20, lora_trainer.OUT_OF_MEMORY_ADVICE)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
try:
    made.training_step(made.model, {"rows": [replace(pair, chosen=pair.chosen * 1000) for pair in pairs[:1]]})
except RunFailedError as fault:
    print(fault)
"""
    beside = Path(__file__).parent
    command = [sys.executable, "-c", program, tmp_path, beside, beside.parent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures, too_little = done.stdout.splitlines()
    notes, size, off = figures.split()
    assert int(notes) >= 1
    assert int(size) < 2**20
    assert float(off) < 1e-5
    assert "out of memory even with the smallest batch; lower max_length" in too_little


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_not_finite_loss_stops_the_run_and_names_its_rows(
    budget: int, base: Base, pairs: list[TokenPair], tmp_path: Path
) -> None:
    spoilt = [*pairs[:5], dataclasses.replace(pairs[5], reference=(float("nan"), 0.0)), *pairs[6:]]
    made = trainer(base, spoilt, budget, tmp_path, demo())
    before = [p.detach().clone() for _, p in lora_trainer.trainable(made.model)]
    with pytest.raises(RunFailedError) as refused:
        made.train()
    assert "the loss is not finite" in str(refused.value)
    assert str(refused.value).endswith(f"check these rows: {base.chat.excerpt(pairs[5].chosen)}")
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, lora_trainer.trainable(made.model), strict=True))


def test_a_not_finite_gradient_stops_the_run_and_names_rows(base: Base, pairs: list[TokenPair], tmp_path: Path) -> None:
    made = trainer(base, pairs, 4096, tmp_path, demo())
    _, parameter = next(iter(lora_trainer.trainable(made.model)))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")

    parameter.register_hook(spoil)
    with pytest.raises(RunFailedError, match="step 1: the gradient is not finite") as refused:
        made.train()
    named = str(refused.value).partition("check these rows: ")[2].split("; ")
    assert named[0] in {base.chat.excerpt(pair.chosen) for pair in pairs}


def test_a_full_disk_is_reported_when_the_adapter_is_saved(base: Base, pairs: list[TokenPair], tmp_path: Path) -> None:
    made = trainer(base, pairs, 4096, tmp_path, demo())
    with small_disk(tmp_path / "disk", "256k") as disk:
        fill(disk)
        message = r"the adapter could not be written \(.*No space left.*--resume continues"
        with pytest.raises(RunFailedError, match=message):
            lora_trainer.save_adapter(made.model, disk)

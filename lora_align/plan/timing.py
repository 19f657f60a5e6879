"""Steps that are really taken: how long, and how much memory beside the weights and the adapter."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from lora_align.model import base as bases
from lora_align.model.base import Base, compute_dtype
from lora_align.model.compiled_layers import compiled_layers
from lora_align.model.sampler import LocalSampler
from lora_align.plan.stages import SamplingWork, Stage
from lora_align.train import lora_trainer
from lora_align.train.stepper import with_padding

TIMES = 3  # a step is taken, and the quickest counts


@dataclass(frozen=True)
class StepTiming:
    """A part of a step, forwards and backwards."""

    seconds: float
    before: float  # seconds that the first one takes more, as what is made once
    taken: float  # bytes, at their highest


def time_step(base: Base, stage: Stage, rows: Sequence[Any]) -> StepTiming:
    """Load the base and take a part of a step of its stage, on this device."""
    model = base.load()
    if stage.settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    policy = get_peft_model(model, lora_trainer.fresh_adapter(stage.lora, base)).train()
    objective, where, dtype = stage.objective(model), bases.device(), compute_dtype(base.recipe)
    if stage.settings.compile:
        objective = with_padding(objective)

    def step() -> None:
        policy.zero_grad()
        with torch.autocast(where.type, dtype, enabled=where.type == "cuda" and dtype != torch.float32):
            part = objective.part(rows, objective.weights(rows))
        part.loss.backward()
        float(part.loss.detach())  # waits until it is there

    with compiled_layers(policy, wanted=stage.settings.compile):
        first = _seconds(step)  # what is made once and kept is not the step's
        policy.zero_grad()
        taken = highest(step)
        seconds = min(_seconds(step) for _ in range(TIMES))
    return StepTiming(seconds, first - seconds, taken)


def time_sampling(base: Base, drawing: SamplingWork) -> float:
    """Answers a second: of some that the base draws on this device, as if it were the policy."""
    sampler, answers = LocalSampler(base.load(), base), 0
    began = time.perf_counter()
    for batch in sampler.draw(drawing.asked, drawing.each, drawing.sampling):
        answers += len(batch)
    return answers / (time.perf_counter() - began)


def highest(work: Callable[[], None]) -> float:
    """Bytes of tensors that some work has at once, at most: as CUDA's allocator, or the CPU's, has counted them."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = most = 0
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

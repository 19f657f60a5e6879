"""The time and memory of one training step, measured on this device, and the sampling rate."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from lora_align.model import base as bases
from lora_align.model.base import Base, compute_dtype
from lora_align.model.batch_sampling import LocalSampler
from lora_align.model.compiled_layers import compiled_layers
from lora_align.plan.stages import SamplingWork, Stage
from lora_align.train import lora_trainer
from lora_align.train.stepper import with_padding

TIMES = 3  # repetitions of a step; the fastest one counts


@dataclass(frozen=True)
class StepTiming:
    """Time and memory of one part of a step, forward and backward."""

    seconds: float
    before: float  # extra seconds of the first run, for example for compiling
    taken: float  # peak bytes in addition to weights and adapter


def time_step(base: Base, stage: Stage, rows: Sequence[Any]) -> StepTiming:
    """Load the base and run one part of a step of the stage on this device."""
    model = base.load()
    if stage.settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    policy = get_peft_model(model, lora_trainer.adapter_config(stage.job.lora, base)).train()
    loss, where, dtype = stage.loss(model), bases.device(base.recipe), compute_dtype(base.recipe)
    if stage.settings.compile:
        loss = with_padding(loss)

    def step() -> None:
        policy.zero_grad()
        with torch.autocast(where.type, dtype, enabled=where.type != "cpu" and dtype != torch.float32):
            part = loss.part(rows, loss.weights(rows))
        part.loss.backward()
        float(part.loss.detach())  # waits until the device has finished

    with compiled_layers(policy, wanted=stage.settings.compile):
        first = _seconds(step)  # includes work done only once, such as compiling
        policy.zero_grad()
        peak = peak_bytes(step)
        seconds = min(_seconds(step) for _ in range(TIMES))
    return StepTiming(seconds, first - seconds, peak)


def sampling_rate(base: Base, work: SamplingWork) -> float:
    """Return how many answers per second the base samples on this device.

    The base stands in for the policies, which do not exist yet.
    """
    sampler, answers = LocalSampler(base.load(), base), 0
    began = time.perf_counter()
    for batch in sampler.draw(work.prompts, work.per_prompt, work.sampling):
        answers += len(batch)
    return answers / (time.perf_counter() - began)


def peak_bytes(work: Callable[[], None]) -> float:
    """Return the peak bytes of tensors that `work` allocates, as counted by the allocator of the GPU or the CPU."""
    if torch.accelerator.is_available():
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        work()
        return torch.accelerator.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    live_bytes = most = 0
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live_bytes += event.nbytes()
        most = max(most, live_bytes)
    return float(most)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

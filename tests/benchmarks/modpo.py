"""Train the MODPO baseline (arXiv 2310.03708): DPO on one preference's pairs, with a margin from another's rewards.

With w the own weight, the loss is −log σ((β ∇log π/π_ref − (1 − w) β ∇log π_other/π_ref)/w), where ∇ is chosen minus
rejected. That equals DPO at β/w whose reference is moved by 1 − w towards the other policy. Our trainer supports both
changes without new code. One setting was tried, the recipe's own.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from lora_align.adapters import peft_format
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.model.logprobs import TOKENS, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.tokenise import TokenPair
from lora_align.policy import start_policy
from lora_align.recipe import Recipe
from lora_align.train import dpo, lora_trainer
from lora_align.train.checkpoints import Checkpoints
from lora_align.train.job import Target
from lora_align.train.reference_cache import ReferenceCache

OWN = 0.5  # the weight of the preference whose pairs are trained on; the other preference has the rest


def train(project: Recipe, own: str, other: Path, folder: Path) -> float:
    """Train an adapter from one preference's pairs and another's adapter.

    Return the seconds of training and of computing the other adapter's log-probabilities.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base, screen = bases.find(project.base), Screen(quiet=True)
    start = start_policy.adapter(project, folder.parent)
    model = start_policy.load(base, start)
    budget = MemoryBudget(project.dpo.tokens_per_batch)
    references = ReferenceCache.of(base, start_policy.identity(start))
    material = dpo.with_references(
        dpo.prepare(project, own, base, screen), references, model, 2 * budget.size, "MODPO", screen
    )
    began = time.perf_counter()
    mixer = Mixer(model, {"other": peft_format.load(other, whole=True)}, {"other": 1.0})
    moved = replace(material, train=_moved(model, material.train), held_out=_moved(model, material.held_out))
    mixer.remove()
    took = time.perf_counter() - began
    settings = replace(project, dpo=replace(project.dpo, beta=project.dpo.beta / OWN))
    unfinished = Checkpoints.of(folder, {}, resume=False, force=True, screen=screen)
    job = dpo.dpo_job(settings.dpo, settings.lora, moved.train, base)
    trained = lora_trainer.train(job, model, Target(folder, "MODPO", screen), unfinished, folder, budget)
    unfinished.clear()
    return took + trained.seconds


def _moved(model: PreTrainedModel, rows: Sequence[TokenPair]) -> list[TokenPair]:
    """Return the rows with references between the start policy's and those of the current model."""
    present = answer_logprobs(model, [row.shared() for row in rows], MemoryBudget(TOKENS)).view(-1, 2).tolist()
    moved = []
    for row, there in zip(rows, present, strict=True):
        chosen, rejected = (OWN * before + (1 - OWN) * now for before, now in zip(row.reference, there, strict=True))
        moved.append(replace(row, reference=(chosen, rejected)))
    return moved

"""Fine-tuning of an `rsf` policy on chosen answers: supervised, or by DPO of the best answer against the worst."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lora_align.console import count
from lora_align.data.pairs import is_held_out
from lora_align.data.rows import Conversation, Message, Pair, Prompt, Rated
from lora_align.errors import RunFailedError
from lora_align.model import tokenise
from lora_align.policy import start_policy
from lora_align.recipe import Dpo, Rsf, Training
from lora_align.rsf import sampling_requests
from lora_align.rsf.inputs import RsfInputs
from lora_align.rsf.selection import Choice
from lora_align.runs import Manifest
from lora_align.train import checkpoints, dpo, lora_trainer, sft
from lora_align.train.checkpoints import Checkpoints
from lora_align.train.job import Target
from lora_align.train.reference_cache import ReferenceCache
from lora_align.train.token_rows import Row, TokenRows

Examples = Sequence[tuple[Prompt, Conversation]]  # a prompt as it was read, and the conversation to train on


def sample_replay(settings: Rsf, answers: Sequence[Rated], chosen: int, t: int) -> Examples:
    """Sample answers of the data, without a direction. They make up the share `rsf.replay` of all examples.

    `chosen` is the number of the other examples.
    """
    wanted = min(len(answers), replayed(settings, chosen))
    picked = random.Random(f"{settings.seed} replay {t}").sample(answers, wanted)
    return [(row.prompt, Conversation((*row.prompt, Message("assistant", row.answer)))) for row in picked]


def replayed(settings: Rsf, chosen: int) -> int:
    """Return the number of replayed answers beside `chosen` other examples."""
    return round(chosen * settings.replay / (1 - settings.replay))


def dpo_settings(settings: Rsf) -> Dpo:
    """Return the settings of an iteration's training by DPO."""
    shared = {field.name: getattr(settings, field.name) for field in fields(Training)}
    return Dpo(**shared, beta=settings.beta)


def train_supervised(rsf: RsfInputs, examples: Examples, target: Target, staging: Path, manifest: Manifest) -> Manifest:
    """Fine-tune the start policy on conversations. Return the manifest with the training's facts."""
    settings = rsf.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, rsf.base.max_length)
    conversations = [conversation for _, conversation in examples]
    texts = tokenise.texts(conversations, rsf.base.chat, longest, counts, answers_only=settings.answers_only)
    rows = _split([prompt for prompt, _ in examples], texts, settings.held_out, target.label)
    model = start_policy.load(rsf.base, rsf.start)
    job = sft.sft_job(settings, rsf.lora, rows.train, rsf.base)
    trained = lora_trainer.train(job, model, target, _checkpoints(rsf, rows, target), staging)
    return with_metrics(sft.measure(trained, manifest, rows.held_out), **{"truncated or dropped": dict(counts)})


def train_by_dpo(
    rsf: RsfInputs, choices: Sequence[Choice], target: Target, staging: Path, manifest: Manifest
) -> Manifest:
    """Train the start policy by DPO, with the best answer chosen and the worst rejected.

    Return the manifest with the training's facts.
    """
    settings = rsf.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, rsf.base.max_length)
    pairs = [Pair(sampling_requests.with_direction(settings, of), of.best.text, of.worst.text) for of in choices]
    different = [i for i, pair in enumerate(pairs) if pair.chosen != pair.rejected]
    counts["best and worst are equal"] = len(pairs) - len(different)
    token_pairs = tokenise.pairs([pairs[i] for i in different], rsf.base.chat, longest, counts)
    rows = _split([choices[i].prompt for i in different], token_pairs, settings.held_out, target.label)
    model = start_policy.load(rsf.base, rsf.start)
    references = ReferenceCache.of(rsf.base, start_policy.identity(rsf.start))
    tokens, label = 2 * settings.tokens_per_batch, f"{target.label} reference"
    rows = dpo.with_references(rows, references, model, tokens, label, target.screen)
    job = dpo.dpo_job(dpo_settings(settings), rsf.lora, rows.train, rsf.base)
    trained = lora_trainer.train(job, model, target, _checkpoints(rsf, rows, target), staging)
    return with_metrics(dpo.measure(trained, manifest, rows.held_out), **{"truncated or dropped": dict(counts)})


def with_metrics(manifest: Manifest, **metrics: Any) -> Manifest:
    """Return a manifest with further metrics."""
    return replace(manifest, metrics={**manifest.metrics, **metrics})


def _checkpoints(rsf: RsfInputs, rows: TokenRows[Row], target: Target) -> Checkpoints:
    """Return the checkpoints of a policy; refuse those of other rows."""
    fingerprint = hashlib.sha256(json.dumps([asdict(row) for row in rows.train]).encode()).hexdigest()
    identity = start_policy.identity(rsf.start)
    return target.checkpoints(checkpoints.run_identity("rsf", rsf.recipe, rsf.base, identity, fingerprint))


def _split(prompts: Sequence[Prompt], rows: Sequence[Row | None], held_out: float, label: str) -> TokenRows[Row]:
    splits: tuple[list[Row], list[Row]] = ([], [])
    for prompt, row in zip(prompts, rows, strict=True):
        if row is not None:
            splits[is_held_out(prompt, held_out)].append(row)
    if not splits[0]:
        held_out_rows = count(len(splits[1]), "row")
        raise RunFailedError(f"{label}: no rows to train on (held out: {held_out_rows}); give rsf more prompts")
    return TokenRows(*splits, facts={})

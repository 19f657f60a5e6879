"""How a policy of a series learns from the answers that were chosen for it."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lora_align.console import Screen, count
from lora_align.data.pairs import is_held_out
from lora_align.data.rows import Conversation, Message, Pair, Prompt, Rated
from lora_align.errors import RunFailedError
from lora_align.model import tokenise
from lora_align.policy import start as start_policy
from lora_align.rankers import Direction
from lora_align.recipe import Dpo, Rsf, Training
from lora_align.rsf import sampling_requests
from lora_align.rsf.inputs import RsfInputs
from lora_align.rsf.selection import Choice
from lora_align.train import checkpoints, dpo, sft
from lora_align.train.checkpoints import Unfinished
from lora_align.train.reference_cache import ReferenceCache
from lora_align.train.token_rows import Row, TokenRows

Examples = list[tuple[Prompt, Conversation]]  # a prompt as it was read, and the conversation to learn from


def replayed(settings: Rsf, half: Sequence[Rated], beside: int, t: int) -> Examples:
    """Answers as they came, under no direction, so that they make up the recipe's share of the whole."""
    count = min(len(half), round(beside * settings.replay / (1 - settings.replay)))
    picked = random.Random(f"{settings.seed} replay {t}").sample(half, count)
    return [(row.prompt, Conversation((*row.prompt, Message("assistant", row.answer)))) for row in picked]


def finetune_supervised(
    plan: RsfInputs, learned: Examples, label: str, staging: Path, screen: Screen
) -> dict[str, Any]:
    """Supervised, on the answers (or on all the text)."""
    settings = plan.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, plan.base.max_length)
    texts = [conversation for _, conversation in learned]
    rows = tokenise.texts(texts, plan.base.chat, longest, counts, answers_only=settings.loss_on == "answers")
    material = _split([prompt for prompt, _ in learned], rows, settings.held_out, label)
    model = start_policy.load(plan.base, plan.start)
    unfinished = _begun(plan, material, label, screen)
    facts = sft.train_adapter(model, plan.base, plan.lora, settings, material, label, staging, unfinished, screen)
    return _with_counts(facts, counts)


def finetune_dpo(
    plan: RsfInputs, choices: Sequence[Choice], label: str, staging: Path, screen: Screen
) -> dict[str, Any]:
    """By DPO, the best answer over the worst, both behind what was asked."""
    settings = plan.settings
    counts: Counter[str] = Counter()
    longest = min(settings.max_length, plan.base.max_length)
    pairs = [Pair(sampling_requests.as_asked(settings, of), of.best.text, of.worst.text) for of in choices]
    unlike = [i for i, pair in enumerate(pairs) if pair.chosen != pair.rejected]
    counts["best and worst are equal"] = len(pairs) - len(unlike)
    rows = tokenise.pairs([pairs[i] for i in unlike], plan.base.chat, longest, counts)
    material = _split([choices[i].prompt for i in unlike], rows, settings.held_out, label)
    model = start_policy.load(plan.base, plan.start)
    shared = {field.name: getattr(settings, field.name) for field in fields(Training)}
    recipe = replace(plan.recipe, lora=plan.lora, dpo=Dpo(**shared, beta=settings.beta))
    references = ReferenceCache.of(plan.base, start_policy.identity(plan.start))
    tokens = 2 * settings.tokens_per_batch
    material = dpo.referenced(material, references, model, tokens, f"{label} reference", screen)
    unfinished = _begun(plan, material, label, screen)
    facts, _ = dpo.train_adapter(model, plan.base, recipe, material, Direction.pos, label, staging, unfinished, screen)
    return _with_counts(facts, counts)


def _begun(plan: RsfInputs, material: TokenRows[Row], label: str, screen: Screen) -> Unfinished:
    """A series always goes on: that of which things it is made was checked before."""
    rows = json.dumps([asdict(row) for row in material.train])
    data = hashlib.sha256(rows.encode()).hexdigest()
    who = checkpoints.run_identity("rsf", plan.recipe, plan.base, start_policy.identity(plan.start), data)
    return Unfinished.of(plan.folder / label, who, resume=True, force=plan.force, screen=screen)


def _split(prompts: Sequence[Prompt], rows: Sequence[Row | None], held_out: float, label: str) -> TokenRows[Row]:
    sides: tuple[list[Row], list[Row]] = ([], [])
    for prompt, row in zip(prompts, rows, strict=True):
        if row is not None:
            sides[is_held_out(prompt, held_out)].append(row)
    if not sides[0]:
        raise RunFailedError(
            f"{label}: nothing to learn from (held out: {count(len(sides[1]), 'row')}): more prompts, please"
        )
    return TokenRows(*sides, facts={})


def _with_counts(facts: dict[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """What was cut or dropped on the way to the trainer belongs to the record, too."""
    return {**facts, "metrics": {**facts["metrics"], "cut or dropped": dict(counts)}}

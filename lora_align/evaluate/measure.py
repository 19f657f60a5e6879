"""One contestant measured: what it answers, what it likes, what it forgets. Tables, kept on disk; no figure yet."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.data import shards
from lora_align.data.rows import Fact, under_system
from lora_align.evaluate.test_set import TestSet
from lora_align.metrics import refusals, repetition
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.logprobs import TOKENS, Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.sampler import LocalSampler, SampledText
from lora_align.policy import judges, vectors
from lora_align.policy.contestants import START, Policy, PolicySet
from lora_align.policy.judges import Judge

Row = dict[str, Any]
TABLES = ("answers", "margins", "texts", "facts")
FORM = 3  # counted up when something is measured in another way
SCORE = "score "  # before the name of a judge, in a column's name


@dataclass(frozen=True)
class Measured:
    """What was found of one contestant, a row for each answer, pair, text and fact."""

    name: str
    answers: Sequence[Row]
    margins: Sequence[Row]
    texts: Sequence[Row]
    facts: Sequence[Row]


class Evaluator:
    """One loaded base, and over it all that contestants and judges are made of."""

    def __init__(self, field: PolicySet, exam: TestSet, judges_: Mapping[str, Judge]) -> None:
        self.field, self.exam, self.judges, self.base = field, exam, judges_, field.base

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded when somebody is measured who was not before."""
        return self.base.load()

    @cached_property
    def sampler(self) -> LocalSampler:
        """One for all, so that it remembers how many answers fit into memory at once."""
        return LocalSampler(self.model, self.base)

    @cached_property
    def mixer(self) -> Mixer:
        """Everything over it, nothing of it in force."""
        updates, _ = vectors.opened(self.field.vectors)
        if self.field.start is not None:
            updates[START] = peft_format.load(self.field.start.path, whole=True)
        for judge in self.judges.values():
            updates |= judge.updates
        return Mixer(self.model, updates, {})

    @cached_property
    def start_likes(self) -> Mapping[str, Tensor]:
        """log π of both answers of every pair under the start policy."""
        return self.likes(Policy(START, {START: 1.0}))

    def become(self, contestant: Policy) -> None:
        """From here on the model is this one."""
        self.mixer.set(contestant.weights)

    def measure(self, contestant: Policy, report: Callable[[int], None]) -> Measured:
        """Ask everything; `report` hears of answers drawn."""
        answers = self._answers(contestant, report)
        margins, forgets = self._margins(contestant), (self._texts(contestant), self._facts(contestant))
        return Measured(contestant.name, answers, margins, *forgets)

    # --- answers ---

    def _answers(self, contestant: Policy, report: Callable[[int], None]) -> list[Row]:
        asked = [under_system(contestant.system, question.prompt) for question in self.exam.questions]
        self.become(contestant)
        rows: list[Row] = []
        for batch in self.sampler.draw(asked, self.exam.samples, self.exam.sampling):
            rows += [self._read(drawn) for drawn in batch]
            report(len(rows))
        rows.sort(key=lambda row: (row["prompt"], row["number"]))
        if self.exam.sampling.temperature == 1:
            self._add_kl(contestant, rows)
        self._add_scores(rows)
        return rows

    def _read(self, drawn: SampledText) -> Row:
        question = self.exam.questions[drawn.prompt]
        return {
            "prompt": drawn.prompt,
            "asked": question.prompt[-1].content,
            "kind": question.kind,
            "number": drawn.number,
            "answer": drawn.text,
            "ended": drawn.ended,
            "words": len(drawn.text.split()),
            "repeated": repetition.repeated(drawn.text),
            "refused": refusals.refuses(drawn.text),
        }

    def _add_kl(self, contestant: Policy, rows: Sequence[Row]) -> None:
        """log π − log π_start of each answer. As answers at temperature 1 are drawn from π itself, the mean is the KL
        divergence KL(π‖π_start)."""
        sides = []
        for who, system in ((contestant, contestant.system), (Policy(START, {START: 1.0}), "")):
            self.become(who)
            read = []
            for row in rows:
                prompt = under_system(system, self.exam.questions[row["prompt"]].prompt)
                ids = self.base.chat.prompt_ids(prompt)
                answer = self.base.chat.answer_ids(prompt, row["answer"], ended=row["ended"])
                read.append((ids, [answer[: max(1, self.base.max_length - len(ids))]]))
                row["tokens"] = len(read[-1][1][0])
            sides.append(answer_logprobs(self.model, read, MemoryBudget(TOKENS)))
        for row, found in zip(rows, (sides[0] - sides[1]).tolist(), strict=True):
            row["kl"] = found

    def _add_scores(self, rows: Sequence[Row]) -> None:
        """What each judge says, who sees the prompt as it is, without what was asked for."""
        said = [
            judges.tokenise_answer(self.base, self.exam.questions[row["prompt"]].prompt, row["answer"]) for row in rows
        ]
        for name, judge in self.judges.items():
            places = [place for place, one in enumerate(said) if one]
            found = judge.says(self.model, self.mixer, [one for one in said if one])
            for place, scores in zip(places, found, strict=True):
                rows[place] |= {SCORE + judges.column(name, objective): value for objective, value in scores.items()}

    # --- likes ---

    def likes(self, contestant: Policy) -> dict[str, Tensor]:
        """log π(chosen) − log π(rejected) of every preference's pairs; nan where they do not fit."""
        self.become(contestant)
        found = {}
        for name, pairs in self.exam.pairs.items():
            asked = [
                type(pair)(under_system(contestant.system, pair.prompt), pair.chosen, pair.rejected) for pair in pairs
            ]
            tokens = tokenise.pairs(asked, self.base.chat, self.base.max_length, Counter())
            rows: list[Shared] = [row.shared() for row in tokens if row]
            sums = answer_logprobs(self.model, rows, MemoryBudget(TOKENS)).view(-1, 2)
            found[name] = torch.full((len(pairs),), torch.nan)
            found[name][[row is not None for row in tokens]] = (sums[:, 0] - sums[:, 1]).to(found[name])
        return found

    def _margins(self, contestant: Policy) -> list[Row]:
        """Of pairs that fit behind what the contestant is asked for, and without it."""
        before, now = self.start_likes, self.likes(contestant)
        return [
            {"preference": name, "pair": place, "margin": value}
            for name, likes in now.items()
            for place, value in enumerate((likes - before[name]).tolist())
            if math.isfinite(value)
        ]

    # --- forgets ---

    def _texts(self, contestant: Policy) -> list[Row]:
        """Nats of ordinary text behind its first token, with nothing of a chat around it."""
        self.become(contestant)
        encode = self.base.chat.tokenizer
        ids = [encode(text, add_special_tokens=False)["input_ids"][: self.base.max_length] for text in self.exam.texts]
        ids = [row for row in ids if len(row) > 1]
        if not ids:
            return []
        sums = answer_logprobs(self.model, [(row[:1], [row[1:]]) for row in ids], MemoryBudget(TOKENS))
        return [
            {"text": place, "nats": -value, "tokens": len(row) - 1}
            for place, (row, value) in enumerate(zip(ids, sums.tolist(), strict=True))
        ]

    def _facts(self, contestant: Policy) -> list[Row]:
        """Whether it finds what is right likelier than all that is wrong."""
        self.become(contestant)
        asked = [replace(fact, prompt=under_system(contestant.system, fact.prompt)) for fact in self.exam.facts]
        found = facts_known(self.model, self.base, asked)
        return [{"fact": place, "known": value} for place, value in enumerate(found) if value is not None]


def facts_known(model: PreTrainedModel, base: Base, facts: Sequence[Fact]) -> list[bool | None]:
    """Of each fact, whether its right answer has the largest log-probability a token; None where one does not fit."""
    asked = base.chat.answered_each([(fact.prompt, [fact.right, *fact.wrong]) for fact in facts])
    fits = [len(prompt) + max(map(len, answers)) <= base.max_length for prompt, answers in asked]
    fitting = [one for one, fit in zip(asked, fits, strict=True) if fit]
    sums = iter(answer_logprobs(model, fitting, MemoryBudget(TOKENS)).tolist())
    found: list[bool | None] = []
    for (_, answers), fit in zip(asked, fits, strict=True):
        right, *wrong = [next(sums) / len(answer) for answer in answers] if fit else [math.nan]
        found.append(right > max(wrong) if fit else None)
    return found


def measure_cached(
    arena: Evaluator, contestant: Policy, folder: Path, report: Callable[[int], None] = lambda done: None
) -> Measured:
    """As it was measured before, if it was: by what it is made of, what it is asked, and who judges."""
    identity = {
        "form": FORM,
        "contestant": arena.field.lineage(contestant),
        "exam": arena.exam.key,
        "judges": {name: judge.identity for name, judge in arena.judges.items()},
        "versions": runs.library_versions(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    kept = folder / key
    if not (kept / "measured.json").is_file():
        found = arena.measure(contestant, report)
        staging = folder / f".{key}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for table in TABLES:
            shards.write(getattr(found, table), staging / f"{table}.parquet")
        (staging / "measured.json").write_text(json.dumps({"name": contestant.name, **identity}, indent=2))
        runs.sync(staging)
        shutil.rmtree(kept, ignore_errors=True)
        staging.rename(kept)
    else:
        report(len(arena.exam.questions) * arena.exam.samples)
    from pyarrow.parquet import read_table

    tables = {table: read_table(kept / f"{table}.parquet").to_pylist() for table in TABLES}
    return Measured(contestant.name, **tables)

"""One policy measured: what it answers, what it likes, what it forgets. Tables, kept on disk; no figure yet."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align import runs, store
from lora_align.console import Screen
from lora_align.data import shards
from lora_align.data.rows import Fact, with_system_prompt
from lora_align.evaluate.test_set import TestSet, read_test_set
from lora_align.metrics import refusals, repetition
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.logprobs import TOKENS, Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler import SampledText
from lora_align.policy import judges
from lora_align.policy.policy import START_POLICY, Policy
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Recipe

Row = dict[str, Any]
FOLDER = "eval"  # in the runs folder: everything that was measured
TABLES = ("answers", "margins", "texts", "facts")
FORM = 3  # counted up when something is measured in another way
SCORE = "score "  # before the name of a judge, in a column's name


@dataclass(frozen=True)
class Measured:
    """What was found of one policy, a row for each answer, pair, text and fact."""

    name: str
    answers: Sequence[Row]
    margins: Sequence[Row]
    texts: Sequence[Row]
    facts: Sequence[Row]


class Evaluator:
    """Measure policies of a set on the same prompts, pairs, texts and facts."""

    def __init__(self, policies: PolicySet, test_set: TestSet, folder: Path) -> None:
        self.policies, self.test_set, self.folder, self.base = policies, test_set, folder, policies.base

    @classmethod
    def of(
        cls,
        policies: Sequence[Policy],
        recipe: Recipe,
        runs_dir: Path,
        screen: Screen,
        by: Sequence[str] = (),
        preferences: Iterable[str] | None = None,
    ) -> "Evaluator":
        """Read and check everything. The judges in `by` score answers, and those registered for the base; the test set
        has held-out pairs of some `preferences`, or of all."""
        base = bases.find(recipe.base)
        judges_ = judges.find_all(by, base, recipe, runs_dir)
        found = PolicySet.of(policies, recipe, base, runs_dir, screen, judges_)
        return cls(found, read_test_set(recipe, screen, preferences), runs_dir / FOLDER)

    @property
    def model(self) -> PreTrainedModel:
        """The loaded base."""
        return self.policies.model

    @cached_property
    def start_likes(self) -> Mapping[str, Tensor]:
        """log π of both answers of every pair under the start policy."""
        return self.likes(START_POLICY)

    def measure(self, policy: Policy, report: Callable[[int], None]) -> Measured:
        """Ask everything; `report` hears of answers drawn."""
        answers = self._answers(policy, report)
        margins, forgets = self._margins(policy), (self._texts(policy), self._facts(policy))
        return Measured(policy.name, answers, margins, *forgets)

    def measured(self, policy: Policy, report: Callable[[int], None] = lambda done: None) -> Measured:
        """Return what was measured of a policy before, or measure it now; `report` hears of answers sampled.

        The cache key names the files of the policy, the test set, the judges and the versions of libraries.
        """
        identity = {
            "form": FORM,
            "policy": self.policies.lineage(policy),
            "test_set": self.test_set.key,
            "judges": {name: judge.identity for name, judge in self.policies.judges.items()},
            "versions": runs.library_versions(),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        stored = self.folder / key
        if not store.is_intact(stored):
            self._store(self.measure(policy, report), stored, {"name": policy.name, **identity})
        else:
            report(self.test_set.answers)
        from pyarrow.parquet import read_table

        tables = {table: read_table(stored / f"{table}.parquet").to_pylist() for table in TABLES}
        return Measured(policy.name, **tables)

    def measure_all(self, screen: Screen) -> Iterator[Measured]:
        """Yield what is measured of each policy of the set, with progress by answers."""
        each = self.test_set.answers
        with screen.progress("answers", each * len(self.policies.policies)) as progress:
            for number, policy in enumerate(self.policies.policies):

                def report(done: int, before: int = number * each) -> None:
                    progress.show(before + done, {})

                yield self.measured(policy, report)

    def _store(self, found: Measured, stored: Path, about: Mapping[str, Any]) -> None:
        with store.new_folder(stored) as staging:
            for table in TABLES:
                shards.write(getattr(found, table), staging / f"{table}.parquet")
            (staging / "measured.json").write_text(json.dumps(about, indent=2))

    # --- answers ---

    def _answers(self, policy: Policy, report: Callable[[int], None]) -> list[Row]:
        asked = [with_system_prompt(policy.system, question.prompt) for question in self.test_set.questions]
        self.policies.activate(policy)
        rows: list[Row] = []
        for batch in self.policies.sampler.draw(asked, self.test_set.samples, self.test_set.sampling):
            rows += [self._read(drawn) for drawn in batch]
            report(len(rows))
        rows.sort(key=lambda row: (row["prompt"], row["number"]))
        if self.test_set.sampling.temperature == 1:
            self._add_kl(policy, rows)
        self._add_scores(rows)
        return rows

    def _read(self, drawn: SampledText) -> Row:
        question = self.test_set.questions[drawn.prompt]
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

    def _add_kl(self, policy: Policy, rows: Sequence[Row]) -> None:
        """log π − log π_start of each answer. As answers at temperature 1 are drawn from π itself, the mean is the KL
        divergence KL(π‖π_start)."""
        sides = []
        for who in (policy, START_POLICY):
            self.policies.activate(who)
            read = []
            for row in rows:
                prompt = with_system_prompt(who.system, self.test_set.questions[row["prompt"]].prompt)
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
            judges.tokenise_answer(self.base, self.test_set.questions[row["prompt"]].prompt, row["answer"])
            for row in rows
        ]
        for name, judge in self.policies.judges.items():
            places = [place for place, one in enumerate(said) if one]
            found = judge.score(self.model, self.policies.mixer, [one for one in said if one])
            for place, scores in zip(places, found, strict=True):
                rows[place] |= {SCORE + judges.column(name, objective): value for objective, value in scores.items()}

    # --- likes ---

    def likes(self, policy: Policy) -> dict[str, Tensor]:
        """log π(chosen) − log π(rejected) of every preference's pairs; nan where they do not fit."""
        self.policies.activate(policy)
        found = {}
        for name, pairs in self.test_set.pairs.items():
            asked = [
                type(pair)(with_system_prompt(policy.system, pair.prompt), pair.chosen, pair.rejected) for pair in pairs
            ]
            tokens = tokenise.pairs(asked, self.base.chat, self.base.max_length, Counter())
            rows: list[Shared] = [row.shared() for row in tokens if row]
            sums = answer_logprobs(self.model, rows, MemoryBudget(TOKENS)).view(-1, 2)
            found[name] = torch.full((len(pairs),), torch.nan)
            found[name][[row is not None for row in tokens]] = (sums[:, 0] - sums[:, 1]).to(found[name])
        return found

    def _margins(self, policy: Policy) -> list[Row]:
        """Of pairs that fit behind what the policy is asked for, and without it."""
        before, now = self.start_likes, self.likes(policy)
        return [
            {"preference": name, "pair": place, "margin": value}
            for name, likes in now.items()
            for place, value in enumerate((likes - before[name]).tolist())
            if math.isfinite(value)
        ]

    # --- forgets ---

    def _texts(self, policy: Policy) -> list[Row]:
        """Nats of ordinary text behind its first token, with nothing of a chat around it."""
        self.policies.activate(policy)
        encode = self.base.chat.tokenizer
        ids = [
            encode(text, add_special_tokens=False)["input_ids"][: self.base.max_length] for text in self.test_set.texts
        ]
        ids = [row for row in ids if len(row) > 1]
        if not ids:
            return []
        sums = answer_logprobs(self.model, [(row[:1], [row[1:]]) for row in ids], MemoryBudget(TOKENS))
        return [
            {"text": place, "nats": -value, "tokens": len(row) - 1}
            for place, (row, value) in enumerate(zip(ids, sums.tolist(), strict=True))
        ]

    def _facts(self, policy: Policy) -> list[Row]:
        """Whether it finds what is right likelier than all that is wrong."""
        self.policies.activate(policy)
        asked = [replace(fact, prompt=with_system_prompt(policy.system, fact.prompt)) for fact in self.test_set.facts]
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

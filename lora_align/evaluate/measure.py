"""Measurement of one policy, cached: sampled answers, KL, pair margins, text loss, facts."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align import refusals, runs, store
from lora_align.console import Screen
from lora_align.data import shards
from lora_align.data.rows import Fact, with_system_prompt
from lora_align.evaluate.test_set import TestSet, read_test_set
from lora_align.metrics import repetition
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.endpoint import Endpoint
from lora_align.model.logprobs import TOKENS, Shared, answer_logprobs, guided_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import SampledText
from lora_align.policy import judges
from lora_align.policy.policy import START_POLICY, Policy
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Recipe

Row = dict[str, Any]
Report = Callable[[int, str], None]  # the answers sampled so far, and what is measured after them
FOLDER = "eval"  # the folder of cached measurements, in the runs folder
TABLES = ("answers", "margins", "texts", "facts")
FORM = 5  # part of the cache key; raise it whenever a table changes its content
SCORE = "score "  # prefix of columns that hold a judge's scores


@dataclass(frozen=True)
class Measurement:
    """The tables of one policy: a row for each answer, pair, text and fact."""

    name: str
    answers: Sequence[Row]
    margins: Sequence[Row]
    texts: Sequence[Row]
    facts: Sequence[Row]


class Evaluator:
    """Measure the policies of a set on the same prompts, pairs, texts and facts."""

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
        server: Endpoint | None = None,
    ) -> "Evaluator":
        """Check the policies, and read the test set with held-out pairs of `preferences`, or of all.

        The judges are the base's own and those named in `by`. An empty `by` means the default reward model. A `server`
        samples the answers.
        """
        base = bases.find(recipe.base)
        judges_ = judges.find_all(by, base, recipe, runs_dir)
        policy_set = PolicySet.of(policies, recipe, base, runs_dir, screen, judges_, server)
        return cls(policy_set, read_test_set(recipe, screen, preferences), runs_dir / FOLDER)

    @property
    def model(self) -> PreTrainedModel:
        """Return the loaded base."""
        return self.policies.model

    @cached_property
    def start_log_ratios(self) -> Mapping[str, Tensor]:
        """Return the log-ratios of all pairs under the start policy."""
        return self.pair_log_ratios(START_POLICY)

    def measure(self, policy: Policy, report: Report = lambda sampled, now: None) -> Measurement:
        """Return the cached measurement of a policy, or measure it.

        `report` is called with the number of answers sampled so far, and with what is measured now. The cache key
        names the files of the policy, the test set, the judges and the versions of libraries.
        """
        identity = {
            "form": FORM,
            "policy": self.policies.lineage(policy),
            "test_set": self.test_set.key,
            "judges": {name: judge.identity for name, judge in self.policies.judges.items()},
            "versions": runs.library_versions(),
            **({"server": self.policies.server.url} if self.policies.server else {}),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        stored = self.folder / key
        if not store.is_intact(stored):
            tables = {
                "answers": self._answers(policy, report),
                "margins": self._margins(policy, report),
                "texts": self._texts(policy, report),
                "facts": self._facts(policy, report),
            }
            self._store(tables, stored, {"name": policy.name, **identity})
        else:
            report(self.test_set.answers, "")
        from pyarrow.parquet import read_table

        return Measurement(policy.name, **{name: read_table(stored / f"{name}.parquet").to_pylist() for name in TABLES})

    def measure_all(self, screen: Screen) -> Iterator[Measurement]:
        """Yield the measurement of each policy of the set, and show progress by answers."""
        each = self.test_set.answers
        with screen.progress("answers", each * len(self.policies.policies)) as progress:
            for number, policy in enumerate(self.policies.policies):

                def report(done: int, now: str, before: int = number * each) -> None:
                    progress.show(before + done, {"now": now} if now else {})

                yield self.measure(policy, report)

    def _store(self, tables: Mapping[str, Sequence[Row]], stored: Path, about: Mapping[str, Any]) -> None:
        with store.new_folder(stored) as staging:
            for name, rows in tables.items():
                shards.write(rows, staging / f"{name}.parquet")
            (staging / "measured.json").write_text(json.dumps(about, indent=2))

    # --- answers ---

    def _answers(self, policy: Policy, report: Report) -> list[Row]:
        prompts = [with_system_prompt(policy.system, question.prompt) for question in self.test_set.questions]
        rows: list[Row] = []
        for batch in self.policies.sampler_of(policy).draw(prompts, self.test_set.samples, self.test_set.sampling):
            rows += [self._answer_row(sampled) for sampled in batch]
            report(len(rows), "")
        rows.sort(key=lambda row: (row["prompt"], row["number"]))
        if self.test_set.sampling.temperature == 1:
            self._add_kl(policy, rows)
        self._add_scores(rows)
        return rows

    def _answer_row(self, sampled: SampledText) -> Row:
        question = self.test_set.questions[sampled.prompt]
        return {
            "prompt": sampled.prompt,
            "asked": question.prompt[-1].content,
            "kind": question.kind,
            "number": sampled.number,
            "answer": sampled.text,
            "ended": sampled.ended,
            "ids": list(sampled.ids),
            "words": len(sampled.text.split()),
            "repeated": repetition.repeated(sampled.text),
            "refused": refusals.refuses(sampled.text),
        }

    def _add_kl(self, policy: Policy, rows: Sequence[Row]) -> None:
        """Add log π − log π_start of the sampled tokens of each answer.

        Answers at temperature 1 are samples of π, so the mean estimates KL(π‖π_start). The text is not tokenised again,
        because that may give other tokens. An empty answer has no value.
        """
        rows = [row for row in rows if row["ids"]]
        answered: list[list[Shared]] = [[], []]  # under the policy's system prompt, and without one
        for row in rows:
            prompt = self.test_set.questions[row["prompt"]].prompt
            contexts = [self.base.chat.prompt_ids(with_system_prompt(of, prompt)) for of in (policy.system, "")]
            row["tokens"] = min(len(row["ids"]), max(1, self.base.max_length - max(map(len, contexts))))
            for of, ids in zip(answered, contexts, strict=True):
                of.append((ids, [row["ids"][: row["tokens"]]]))
        logprobs = self._logprobs(policy, *answered) - self._logprobs(START_POLICY, answered[1], answered[1])
        for row, log_ratio in zip(rows, logprobs.tolist(), strict=True):
            row["kl"] = log_ratio

    def _logprobs(self, policy: Policy, rows: Sequence[Shared], plain: Sequence[Shared]) -> Tensor:
        """Return log π of every answer. `plain` has the same answers to the prompts without the system prompt."""
        self.policies.activate(policy)
        budget = MemoryBudget(TOKENS)
        if policy.strength == 1:
            return answer_logprobs(self.model, rows, budget)
        return guided_logprobs(self.model, rows, plain, policy.strength, budget)

    def _add_scores(self, rows: Sequence[Row]) -> None:
        """Add each judge's scores. A judge sees the prompt without the policy's system message."""
        answers = [(self.test_set.questions[row["prompt"]].prompt, row["answer"]) for row in rows]
        for name in self.policies.judges:
            for row, scores in zip(rows, self.policies.score(name, answers), strict=True):
                row |= {SCORE + judges.column(name, objective): value for objective, value in scores.items()}

    # --- margins on held-out pairs ---

    def pair_log_ratios(self, policy: Policy) -> dict[str, Tensor]:
        """Return log π(chosen) − log π(rejected) of every preference's pairs.

        The value is nan if the prompt fills the context, or if the answers are equal once truncated.
        """
        ratios = {}
        for name, pairs in self.test_set.pairs.items():
            prompted = [replace(pair, prompt=with_system_prompt(policy.system, pair.prompt)) for pair in pairs]
            forms = (prompted, pairs) if policy.system else (pairs,)
            tokens = [tokenise.pairs(of, self.base.chat, self.base.max_length, Counter()) for of in forms]
            tokens = [*tokens, *tokens][:2]
            fitting = [(one, plain) for one, plain in zip(*tokens, strict=True) if one and plain]
            rows = [one.shared() for one, _ in fitting]
            plain_rows: list[Shared] = [(plain.prompt, row[1]) for (_, plain), row in zip(fitting, rows, strict=True)]
            sums = self._logprobs(policy, rows, plain_rows).view(-1, 2)
            ratios[name] = torch.full((len(pairs),), torch.nan)
            fits = [one is not None and plain is not None for one, plain in zip(*tokens, strict=True)]
            ratios[name][fits] = (sums[:, 0] - sums[:, 1]).to(ratios[name])
        return ratios

    def _margins(self, policy: Policy, report: Report = lambda sampled, now: None) -> list[Row]:
        """Return the margin of each pair that fits into the context with and without the policy's system message."""
        report(self.test_set.answers, "pairs")
        start = self.start_log_ratios
        ratios = start if policy == START_POLICY else self.pair_log_ratios(policy)
        return [
            {"preference": name, "pair": place, "margin": margin}
            for name, of_pairs in ratios.items()
            for place, margin in enumerate((of_pairs - start[name]).tolist())
            if math.isfinite(margin)
        ]

    # --- ordinary text and facts ---

    def _texts(self, policy: Policy, report: Report) -> list[Row]:
        """Return the loss of each text without its first token, in nats. No chat template is applied."""
        if not self.test_set.texts:
            return []
        report(self.test_set.answers, "texts")
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

    def _facts(self, policy: Policy, report: Report) -> list[Row]:
        if not self.test_set.facts:
            return []
        report(self.test_set.answers, "facts")
        self.policies.activate(policy)
        known = facts_known(self.base, self.test_set.facts, policy.system, partial(self._logprobs, policy))
        return [{"fact": place, "known": value} for place, value in enumerate(known) if value is not None]


def facts_known(
    base: Base,
    facts: Sequence[Fact],
    system: str,
    logprobs: Callable[[Sequence[Shared], Sequence[Shared]], Tensor],
) -> list[bool | None]:
    """Return whether the correct answer of each fact has the highest mean log-probability per token.

    The value is None for a fact that is too long. `logprobs` takes answers after prompts with the system prompt, and
    the same answers after prompts without it.
    """
    with_system, plain = (
        base.chat.answered_each([(with_system_prompt(text, fact.prompt), [fact.right, *fact.wrong]) for fact in facts])
        for text in (system, "")
    )
    fits = [len(prompt) + max(map(len, answers)) <= base.max_length for prompt, answers in with_system]
    fitting = [[row for row, fit in zip(of, fits, strict=True) if fit] for of in (with_system, plain)]
    sums = iter(logprobs(*fitting).tolist())
    known: list[bool | None] = []
    for (_, answers), fit in zip(with_system, fits, strict=True):
        right, *wrong = [next(sums) / len(answer) for answer in answers] if fit else [math.nan]
        known.append(right > max(wrong) if fit else None)
    return known

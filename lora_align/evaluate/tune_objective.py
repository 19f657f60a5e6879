"""The objective of `tune` and its gradient: pairs preferred correctly, minus penalties for exceeding bounds.

Every evaluation uses the same held-out pairs, the same texts, and the same answers, sampled once from the start policy.
The base and the vectors are frozen: only the weights have a gradient.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.errors import UserError
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.test_set import Question
from lora_align.model import tokenise
from lora_align.model.logprobs import Answered, Reader, in_parts
from lora_align.model.memory_budget import MemoryBudget
from lora_align.plan.stages import TUNE_PAIRS
from lora_align.policy.policy import START, START_POLICY
from lora_align.recipe import Training
from lora_align.train.lora_trainer import OUT_OF_MEMORY_ADVICE

MAX_ANSWERS, MAX_TEXTS = 32, 16  # answers of the start policy, and ordinary texts
DECIMAL_SCALE = 1000  # weights are truncated to three decimals
PENALTY = 20.0  # beyond a bound the penalty is PENALTY · (figure / bound − 1)²
KL, LOSS = "KL", "text loss"  # names of figures; no preference has a capital or a space in its name
NORMAL = NormalDist()


@dataclass(frozen=True)
class Bounds:
    """Bounds on a policy, relative to the start policy."""

    kl: float  # KL(start‖π) in nats per token, on answers of the start policy
    loss: float  # rise of the loss on ordinary text, in nats per token
    refused: float  # rise of the share of safe prompts refused
    weight: float  # largest absolute weight

    @property
    def without_sampling(self) -> Mapping[str, float]:
        """Return the bounds that need no sampled answers of the mix."""
        return {KL: self.kl, LOSS: self.loss}


@dataclass(frozen=True)
class Rows:
    """Tokenised answers with a sign and the start policy's token log-probabilities; sums are divided by `count`."""

    rows: Sequence[Answered]
    signs: Sequence[float]
    start: Sequence[Tensor]
    count: float


@dataclass(frozen=True)
class Evaluation:
    """The objective and its gradient at some weights, and the figures there."""

    weights: Tensor
    value: float
    gradient: Tensor
    figures: Mapping[str, float]  # each preference's margin, KL and LOSS
    preferred: Mapping[str, float]  # accuracy on held-out pairs, for each preference with enough of them


class TuneObjective:
    """The function that `tune` maximises: Σ aim · Φ(mean margin / spread), minus penalties for exceeding bounds.

    Φ(mean margin / spread) is the share of pairs preferred correctly if margins were normal; unlike the counted share,
    it has a gradient. The spread is the standard deviation of margins under the preference's own vector.
    """

    def __init__(self, evaluator: Evaluator, aims: Mapping[str, float], bounds: Bounds, settings: Training) -> None:
        self.evaluator, self.policies = evaluator, evaluator.policies
        self.aims, self.bounds, self.settings = aims, bounds, settings
        self.budget = MemoryBudget(settings.tokens_per_batch, OUT_OF_MEMORY_ADVICE)
        self.max_length = min(settings.max_length, evaluator.base.max_length)
        self.names = list(evaluator.policies.vectors)  # preferences, or groups of their layers
        self.reader = Reader.of(evaluator.model)
        self.pairs = {name: self._pairs(name) for name in aims}
        self.spread = {name: self._own_spread(name) for name in aims}
        self.answers, self.texts = self._start_answers(), self._texts()
        self.cached: dict[tuple[float, ...], Evaluation] = {}

    def at(self, weights: Tensor) -> Evaluation:
        """Return the objective and its gradient at `weights`, truncated to three decimals.

        Results are cached because the line search revisits the boundary.
        """
        weights = (weights * DECIMAL_SCALE).trunc() / DECIMAL_SCALE
        key = tuple(weights.tolist())
        if key not in self.cached:
            self.cached[key] = self._evaluate(weights)
        return self.cached[key]

    def named(self, weights: Tensor) -> dict[str, float]:
        """Return weights by the names of vectors."""
        return dict(zip(self.names, weights.tolist(), strict=True))

    def excess(self, place: Evaluation) -> float:
        """Return the largest ratio of KL or text loss to its bound; a ratio above 1 exceeds the bound."""
        return max(place.figures[name] / bound for name, bound in self.bounds.without_sampling.items())

    def _evaluate(self, weights: Tensor) -> Evaluation:
        figures: dict[str, float] = {}
        preferred: dict[str, float] = {}
        value, gradient = 0.0, torch.zeros_like(weights)
        for name, aim in self.aims.items():
            sums, of_mean = self._sums_and_gradient(weights, self.pairs[name], _log_ratio)
            figures[name] = float(sums.sum()) / self.pairs[name].count
            if (margins := _margins(sums)).numel() >= MIN_HELD_OUT:
                preferred[name] = float((margins > 0).float().mean())
            effect = figures[name] / self.spread[name]
            value += aim * NORMAL.cdf(effect)
            gradient = gradient + aim * NORMAL.pdf(effect) / self.spread[name] * of_mean
        for name, (rows, function) in {KL: (self.answers, _kl_estimate), LOSS: (self.texts, _log_ratio)}.items():
            figures[name] = float(self._sums(weights, rows, function).sum()) / rows.count
            bound = self.bounds.without_sampling[name]
            if (over := figures[name] / bound - 1) > 0:  # the penalty and its gradient are 0 within the bound
                value -= PENALTY * over**2
                of_mean = self._sums_and_gradient(weights, rows, function)[1]
                gradient = gradient - 2 * PENALTY * over / bound * of_mean
        return Evaluation(weights, value, gradient, figures, preferred)

    def _sums(self, weights: Tensor, rows: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return, for each row, its sign times the sum of `function(log π − log π_start)` over its tokens."""
        logprobs = self._logprobs(rows.rows, self.named(weights))
        signed = zip(rows.signs, logprobs, rows.start, strict=True)
        return torch.tensor([float(sign * function(of - start).sum()) for sign, of, start in signed])

    def _sums_and_gradient(
        self, weights: Tensor, rows: Rows, function: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return `_sums`, and the gradient of their total divided by `count`. Rows are read in parts that fit."""
        leaf = weights.detach().requires_grad_()
        steered = {name: leaf[place] for place, name in enumerate(self.names)}
        if self.policies.start is not None:
            steered[START] = torch.ones(())

        def read(part: list[int]) -> tuple[Tensor, Tensor]:
            self.policies.mixer.steer(steered)
            logprobs = self.reader.tokens([rows.rows[i] for i in part])
            values = function(logprobs - torch.cat([rows.start[i] for i in part]).to(logprobs))
            by_row = values.split([len(rows.start[i]) for i in part])
            signed = torch.stack([rows.signs[i] * of.sum() for i, of in zip(part, by_row, strict=True)])
            return signed.detach().cpu(), torch.autograd.grad(signed.sum() / rows.count, leaf)[0].cpu()

        sums, gradient = torch.zeros(len(rows.rows)), torch.zeros_like(weights)
        with checkpointed(self.evaluator.model, wanted=self.settings.gradient_checkpointing):
            for part, (signed, of_part) in in_parts(_lengths(rows.rows), self.budget, read):
                sums[part] = signed
                gradient += of_part
        return sums, gradient

    def _pairs(self, name: str) -> Rows:
        pairs, base = self.evaluator.test_set.pairs[name][:TUNE_PAIRS], self.evaluator.base
        tokens = [row for row in tokenise.pairs(pairs, base.chat, self.max_length, Counter()) if row]
        if len(tokens) < 2:
            raise UserError(f"{name}: too few held-out pairs to tune with; raise dpo.held_out or eval.pairs")
        answers = [(row.prompt, answer) for row in tokens for answer in (row.chosen, row.rejected)]
        return self._with_start(answers, [1.0, -1.0] * len(tokens), len(tokens))

    def _own_spread(self, name: str) -> float:
        """Return the standard deviation of margins under the preference's own vector."""
        weights = torch.tensor([float(part.partition("@")[0] == name) for part in self.names])
        return max(float(_margins(self._sums(weights, self.pairs[name], _log_ratio)).std()), 1e-6)

    def _start_answers(self) -> Rows:
        """Sample answers of the start policy."""
        test_set, chat = self.evaluator.test_set, self.evaluator.base.chat
        prompts = [question.prompt for question in evenly_spaced(test_set.questions, MAX_ANSWERS)]
        self.policies.activate(START_POLICY)
        sampled = [one for batch in self.policies.sampler.draw(prompts, 1, test_set.sampling) for one in batch]
        rows = [(chat.prompt_ids(prompts[one.prompt]), list(one.ids)) for one in sampled if one.ids]
        return self._with_start(
            [(ids, answer[: self.max_length - len(ids)]) for ids, answer in rows if len(ids) < self.max_length]
        )

    def _texts(self) -> Rows:
        """Tokenise ordinary text. The first token serves as the prompt, the other tokens as the answer."""
        encode = self.evaluator.base.chat.tokenizer
        ids = [
            encode(text, add_special_tokens=False)["input_ids"] for text in self.evaluator.test_set.texts[:MAX_TEXTS]
        ]
        rows = [(row[:1], row[1 : self.max_length]) for row in ids if len(row) > 1]
        return self._with_start(rows, [-1.0] * len(rows))

    def _with_start(self, rows: Sequence[Answered], signs: Sequence[float] = (), count: float = 0.0) -> Rows:
        """Add the start policy's log-probabilities. The default of `count` is the number of answer tokens."""
        tokens = sum(len(answer) for _, answer in rows)
        return Rows(rows, signs or [1.0] * len(rows), self._logprobs(rows, {}), count or max(tokens, 1))

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[Answered], weights: Mapping[str, float]) -> list[Tensor]:
        """Return log π of every token of every answer."""
        self.policies.activate(self.policies.policies[0].at(weights))
        by_row: dict[int, Tensor] = {}

        def read(part: list[int]) -> Tensor:
            return self.reader.tokens([rows[i] for i in part]).cpu()

        for part, tokens in in_parts(_lengths(rows), self.budget, read):
            by_row |= zip(part, tokens.split([len(rows[i][1]) for i in part]), strict=True)
        return [by_row[i] for i in range(len(rows))]


def _lengths(rows: Sequence[Answered]) -> list[int]:
    return [len(prompt) + len(answer) for prompt, answer in rows]


@contextmanager
def checkpointed(model: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """Enable gradient checkpointing, if wanted, and put the model back into eval mode afterwards."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def _margins(sums: Tensor) -> Tensor:
    """Return the margins of pairs from the signed sums of their chosen and rejected answers."""
    return sums.view(-1, 2).sum(1)


def evenly_spaced(questions: Sequence[Question], count: int) -> list[Question]:
    """Return at most `count` questions at equal distances."""
    step = max(len(questions) / count, 1.0)
    return [questions[math.floor(place * step)] for place in range(min(count, len(questions)))]


def _log_ratio(log_ratios: Tensor) -> Tensor:
    return log_ratios


def _kl_estimate(log_ratios: Tensor) -> Tensor:
    """Return r − 1 − log r for r = π/π_start (k3 of joschu.net/blog/kl-approx).

    Its mean over tokens of the start policy is KL(π_start‖π). It is never negative, which lowers its variance.
    """
    return log_ratios.exp() - 1 - log_ratios

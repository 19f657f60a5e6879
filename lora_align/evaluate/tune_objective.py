"""What `tune` climbs: how well weights serve aims, with the gradient, and how far they are from the start policy.

Everything is read: held-out pairs, ordinary text, and answers that the start policy gave once. The base is frozen, and
so are the vectors; the weights alone carry a gradient.
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

from lora_align.errors import UserError
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.test_set import Question
from lora_align.model import tokenise
from lora_align.model.logprobs import Answered, Reader, in_parts
from lora_align.model.memory_budget import MemoryBudget
from lora_align.plan.stages import TUNE_PAIRS
from lora_align.policy.policy import START, START_POLICY
from lora_align.recipe import Training
from lora_align.train.lora_trainer import TOO_LONG

ANSWERS, LINES = 32, 16  # of the start policy, of ordinary text
ROUND = 1000  # the weights that there are: so many from 0 to 1
STEEP = 20.0  # times the square of the share by which a bound is passed
KL, LOSS = "KL", "text loss"  # beside names of preferences, of which none has a capital or a space
NORMAL = NormalDist()


@dataclass(frozen=True)
class Bounds:
    """How far it may go from the start policy: nats a token of its answers and of ordinary text, and by how much more
    safe prompts may be refused. And the largest weight: beyond 1, which is as far as training went, margins still grow,
    and answers hardly change."""

    kl: float
    loss: float
    refused: float
    weight: float

    @property
    def read(self) -> Mapping[str, float]:
        """Those that need no answers."""
        return {KL: self.kl, LOSS: self.loss}


@dataclass(frozen=True)
class Rows:
    """Answers behind their prompts, the sign each has in a sum, log π_start of its tokens, and what is divided by."""

    rows: Sequence[Answered]
    signs: Sequence[float]
    start: Sequence[Tensor]
    count: float


@dataclass(frozen=True)
class Evaluated:
    """Weights, how high they lie, which way is up, and what was found there."""

    weights: Tensor
    height: float
    slope: Tensor
    found: Mapping[str, float]  # each preference's margin, KL and LOSS
    preferred: Mapping[str, float]  # the share of each preference's pairs that is preferred rightly, counted


class TuneObjective:
    """What `tune` maximises over weights: Σ aim · the share of held-out pairs that would be preferred rightly. So that
    it has a gradient, that share is taken from the mean margin over the spread of margins under the preference's own
    vector, as if margins were normal."""

    def __init__(self, evaluator: Evaluator, aims: Mapping[str, float], bounds: Bounds, settings: Training) -> None:
        self.evaluator, self.policies = evaluator, evaluator.policies
        self.aims, self.bounds, self.settings = aims, bounds, settings
        self.room = MemoryBudget(settings.tokens_per_batch, TOO_LONG)
        self.longest = min(settings.max_length, evaluator.base.max_length)
        self.names = list(evaluator.policies.vectors)  # preferences, or ranges of their layers
        self.reader = Reader.of(evaluator.model)
        self.pairs = {name: self._pairs(name) for name in aims}
        self.spread = {name: self._own_spread(name) for name in aims}
        self.drawn, self.texts = self._start_answers(), self._lines()
        self.known: dict[tuple[float, ...], Evaluated] = {}

    def at(self, weights: Tensor) -> Evaluated:
        """How it is there, or next to there towards no weights at all: what is looked at has the decimals that weights
        are told with. Whoever climbs comes to the edge of what is allowed again and again."""
        weights = (weights * ROUND).trunc() / ROUND
        key = tuple(weights.tolist())
        if key not in self.known:
            self.known[key] = self._seen(weights)
        return self.known[key]

    def _seen(self, weights: Tensor) -> Evaluated:
        found: dict[str, float] = {}
        preferred: dict[str, float] = {}
        height, slope = 0.0, torch.zeros_like(weights)
        for name, aim in self.aims.items():
            sums, way = self._sums(weights, self.pairs[name], _gain)
            found[name], preferred[name] = _total(self.pairs[name], sums), _won(sums)
            effect = found[name] / self.spread[name]
            height += aim * NORMAL.cdf(effect)
            slope = slope + aim * NORMAL.pdf(effect) / self.spread[name] * way
        for name, (rows, value) in {KL: (self.drawn, _divergence), LOSS: (self.texts, _gain)}.items():
            found[name], bound = _total(rows, self._read_sums(weights, rows, value)), self.bounds.read[name]
            if (over := found[name] / bound - 1) > 0:  # within the bound it has no slope
                height -= STEEP * over**2
                slope = slope - 2 * STEEP * over / bound * self._sums(weights, rows, value)[1]
        return Evaluated(weights, height, slope, found, preferred)

    def beyond(self, place: Evaluated) -> float:
        """How far that is, in shares of the nearest bound that needs no answers: more than 1 passes it."""
        return max(place.found[name] / bound for name, bound in self.bounds.read.items())

    def _read_sums(self, weights: Tensor, rows: Rows, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Of each row, what is made of log π − log π_start of its tokens, with the row's sign."""
        now = self._read(rows.rows, dict(zip(self.names, weights.tolist(), strict=True)))
        signed = zip(rows.signs, now, rows.start, strict=True)
        return torch.tensor([float(sign * value(a - b).sum()) for sign, a, b in signed])

    def _sums(self, weights: Tensor, rows: Rows, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The same, and the gradient of what they come to, part by part."""
        moved = weights.detach().requires_grad_()
        steered = {name: moved[place] for place, name in enumerate(self.names)}
        if self.policies.start is not None:
            steered[START] = torch.ones(())

        def some(part: list[int]) -> tuple[Tensor, Tensor]:
            self.policies.mixer.steer(steered)
            now = self.reader.tokens([rows.rows[i] for i in part])
            gains = value(now - torch.cat([rows.start[i] for i in part]).to(now))
            each = gains.split([len(rows.start[i]) for i in part])
            signed = torch.stack([rows.signs[i] * of.sum() for i, of in zip(part, each, strict=True)])
            return signed.detach().cpu(), torch.autograd.grad(signed.sum() / rows.count, moved)[0].cpu()

        sums, slope = torch.zeros(len(rows.rows)), torch.zeros_like(weights)
        with checkpointed(self.evaluator.model, wanted=self.settings.gradient_checkpointing):
            for part, (signed, way) in in_parts(_lengths(rows.rows), self.room, some):
                sums[part] = signed
                slope += way
        return sums, slope

    def _pairs(self, name: str) -> Rows:
        pairs, base = self.evaluator.test_set.pairs[name][:TUNE_PAIRS], self.evaluator.base
        tokens = [row for row in tokenise.pairs(pairs, base.chat, self.longest, Counter()) if row]
        if len(tokens) < 2:
            raise UserError(f"{name}: too few held-out pairs to tune by (dpo.held_out, eval.pairs)")
        answers = [(row.prompt, answer) for row in tokens for answer in (row.chosen, row.rejected)]
        return self._known(answers, [1.0, -1.0] * len(tokens), len(tokens))

    def _own_spread(self, name: str) -> float:
        """How far pairs' margins lie apart under the preference's own vector."""
        own = {part: 1.0 for part in self.names if part.partition("@")[0] == name}
        weights = torch.tensor([own.get(part, 0.0) for part in self.names])
        return max(float(_margins(self._read_sums(weights, self.pairs[name], _gain)).std()), 1e-6)

    def _start_answers(self) -> Rows:
        test_set, chat = self.evaluator.test_set, self.evaluator.base.chat
        asked = [question.prompt for question in spread(test_set.questions, ANSWERS)]
        self.policies.activate(START_POLICY)
        drawn = [one for batch in self.policies.sampler.draw(asked, 1, test_set.sampling) for one in batch]
        rows = [
            (chat.prompt_ids(asked[one.prompt]), chat.answer_ids(asked[one.prompt], one.text, ended=one.ended))
            for one in drawn
        ]
        return self._known([(ids, said[: self.longest - len(ids)]) for ids, said in rows if len(ids) < self.longest])

    def _lines(self) -> Rows:
        """Ordinary text behind its first token."""
        encode = self.evaluator.base.chat.tokenizer
        ids = [encode(text, add_special_tokens=False)["input_ids"] for text in self.evaluator.test_set.texts[:LINES]]
        lines = [(row[:1], row[1 : self.longest]) for row in ids if len(row) > 1]
        return self._known(lines, [-1.0] * len(lines))

    def _known(self, rows: Sequence[Answered], signs: Sequence[float] = (), count: float = 0.0) -> Rows:
        """With the start policy's log-probabilities; by the token, unless said otherwise."""
        tokens = sum(len(answer) for _, answer in rows)
        return Rows(rows, signs or [1.0] * len(rows), self._read(rows, {}), count or max(tokens, 1))

    @torch.no_grad()
    def _read(self, rows: Sequence[Answered], weights: Mapping[str, float]) -> list[Tensor]:
        """log π of every token of every answer."""
        self.policies.activate(self.policies.policies[0].at(weights))
        found: dict[int, Tensor] = {}

        def some(part: list[int]) -> Tensor:
            return self.reader.tokens([rows[i] for i in part]).cpu()

        for part, tokens in in_parts(_lengths(rows), self.room, some):
            found |= zip(part, tokens.split([len(rows[i][1]) for i in part]), strict=True)
        return [found[i] for i in range(len(rows))]


def _lengths(rows: Sequence[Answered]) -> list[int]:
    return [len(prompt) + len(answer) for prompt, answer in rows]


@contextmanager
def checkpointed(model: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """Compute each layer again on the way back in place of keeping what it computed."""
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


def _total(rows: Rows, sums: Tensor) -> float:
    """The mean, by what they are divided by."""
    return float(sums.sum()) / rows.count


def _margins(sums: Tensor) -> Tensor:
    """Of pairs, whose rejected answers count negatively."""
    return sums.view(-1, 2).sum(1)


def _won(sums: Tensor) -> float:
    return float((_margins(sums) > 0).float().mean())


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """So many of them, from the first to the last."""
    step = max(len(questions) / count, 1.0)
    return [questions[math.floor(place * step)] for place in range(min(count, len(questions)))]


def _gain(more: Tensor) -> Tensor:
    """Of log π − log π_start: that itself."""
    return more


def _divergence(more: Tensor) -> Tensor:
    """π/π_start − 1 − log(π/π_start): over tokens of the start policy its mean is that of the KL divergence, and it is
    never below 0, so that few tokens say much."""
    return more.exp() - 1 - more

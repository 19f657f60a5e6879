"""The loss of the reward model, and the quality of its heads on held-out examples."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_align.data.pairs import MIN_HELD_OUT
from lora_align.metrics import score_quality
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Answered, Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.train.stepper import PartLoss

MEASURE_AT_MOST = 2000  # held-out examples


@dataclass(frozen=True)
class Example:
    """A rated answer with a rating for each head (nan if unrated), or a chosen and a rejected answer for one head."""

    answers: tuple[Answered, ...]
    ratings: tuple[float, ...]
    head: int = -1


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Return a batch: answers, ratings [answers, heads], indices of the known ratings, and pairs with their heads."""
    answers: list[Answered] = []
    pairs = []
    for example in examples:
        if example.head >= 0:
            pairs.append((len(answers), len(answers) + 1, example.head))
        answers += example.answers
    ratings = [example.ratings for example in examples for _ in example.answers]
    known = [(i, head) for i, of in enumerate(ratings) for head, value in enumerate(of) if not math.isnan(value)]
    return {
        "answers": answers,
        "ratings": torch.tensor(ratings),
        "known": torch.tensor(known, dtype=torch.long).view(-1, 2),  # answer, head
        "compared": torch.tensor(pairs, dtype=torch.long).view(-1, 3),  # chosen answer, rejected answer, head
    }


@dataclass(frozen=True)
class RewardLoss:
    """Squared error on ratings, Bradley–Terry loss on pairs, and optionally a language-model loss on answers.

    The first two are averaged together over all ratings and pairs of a step: (z − (rating − mean)/deviation)² for a
    rating, and −log σ(z_chosen − z_rejected) for a pair. z is a head's output at the end of an answer. The
    language-model loss is the mean over the tokens of rated and chosen answers.
    """

    reader: Reader
    heads: Heads
    lm_weight: float
    chat: ChatFormat

    def length(self, row: Example) -> int:
        """Return the tokens of the prompt and of the one or two answers."""
        return self.reader.backbone.length(_shared(row))

    def weights(self, rows: Sequence[Example]) -> list[float]:
        """Return the number of ratings and pairs, and the tokens of the language-model loss."""
        labels = sum(sum(not math.isnan(rating) for rating in row.ratings) + (row.head >= 0) for row in rows)
        return [float(max(labels, 1)), float(sum(len(row.answers[0][1]) for row in rows))]

    def part(self, rows: Sequence[Example], weights: Sequence[float]) -> PartLoss:
        """Return the loss of some examples, divided by the whole step's `weights`."""
        batch = collate(rows)
        states = self.reader.backbone.states([_shared(row) for row in rows])
        z = self.heads(torch.stack([of[end - 1] for of, row in zip(states, rows, strict=True) for end in _ends(row)]))
        answer, head = batch["known"].T.to(z.device)
        ratings = batch["ratings"].to(z.device)[answer, head]
        deviation = self.heads.deviation[head]
        targets = (ratings - self.heads.mean[head]) / deviation
        chosen, rejected, of_pairs = batch["compared"].T.to(z.device)
        losses, errors, margins = reward_losses(z[answer, head], targets, z[chosen, of_pairs], z[rejected, of_pairs])
        loss = losses.sum() / weights[0]

        figures = {
            "error": ((errors.detach() * deviation).square().sum(), float(len(errors))),
            "accuracy": ((margins.detach() > 0).sum(), float(len(margins))),
        }
        if self.lm_weight:
            nats = -self._token_logprobs([(of, *row.answers[0]) for of, row in zip(states, rows, strict=True)])
            figures["lm"] = (nats.detach().sum(), float(len(nats)))
            loss = loss + self.lm_weight * nats.sum() / weights[1]
        return PartLoss(loss, figures)

    def _token_logprobs(self, rows: Sequence[tuple[Tensor, Sequence[int], Sequence[int]]]) -> Tensor:
        """Return log p of every answer token. A row is (states, prompt, answer)."""
        states = torch.cat([of[len(prompt) - 1 : len(prompt) - 1 + len(answer)] for of, prompt, answer in rows])
        targets = torch.tensor([token for _, _, answer in rows for token in answer], device=states.device)
        return self.reader.head.logprobs(states, targets)[0]

    def excerpt(self, row: Example) -> str:
        """Return the first words of the first answer."""
        return self.chat.excerpt(row.answers[0][1])


def reward_losses(rated: Tensor, targets: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of ratings and pairs [n + m], the errors [n] and the margins [m].

    A rating has (z − target)², with head outputs `rated` [n] and standardised ratings `targets` [n]. A pair has
    −log σ(z_chosen − z_rejected) (Bradley–Terry), with head outputs `chosen` [m] and `rejected` [m].
    """
    errors, margins = rated - targets, chosen - rejected
    return torch.cat([errors.square(), -logsigmoid(margins)]), errors, margins


def _shared(row: Example) -> list[list[int]]:
    """Return the prompt, then the answers to it."""
    return [row.answers[0][0], *(answer for _, answer in row.answers)]


def _ends(row: Example) -> list[int]:
    """Return where each answer ends, among the tokens of the prompt and all answers."""
    return list(itertools.accumulate(map(len, _shared(row))))[1:]


def sample_held_out(held_out: Sequence[Example]) -> Sequence[Example]:
    """Sample at most MEASURE_AT_MOST examples uniformly over all sources."""
    return random.Random(0).sample(held_out, min(len(held_out), MEASURE_AT_MOST))


def measure_heads(model: RewardModel, examples: Sequence[Example], budget: MemoryBudget) -> dict[str, Any]:
    """Return each head's rank correlation, error, calibration and accuracy on pairs.

    Also return its correlation with length and with the other heads.
    """
    names = model.heads.names
    if not examples:
        return {"heads": {name: {"rated": 0, "pairs": 0} for name in names}, "between": []}
    batch = collate(examples)
    rows = batch["answers"]
    scores = model.score(rows, budget)[:, : len(names)].double()
    lengths = torch.tensor([[float(len(answer))] for _, answer in rows]).double()
    correlations = score_quality.rank_correlations(torch.cat([scores, lengths], dim=1))
    heads = {}
    for k, name in enumerate(names):
        truth = batch["ratings"][:, k].double()
        known = ~truth.isnan()
        pairs = batch["compared"][batch["compared"][:, 2] == k]
        heads[name] = {"rated": int(known.sum()), "pairs": len(pairs), "length": float(correlations[k, -1])}
        if known.sum() > 1:
            heads[name] |= _rated_figures(scores[known, k], truth[known])
        if len(pairs):
            margins = (scores[pairs[:, 0], k] - scores[pairs[:, 1], k]) / model.heads.deviation[k].cpu()
            heads[name] |= _compared_figures(margins)
    return {"heads": heads, "between": correlations[:-1, :-1].tolist()}


def _rated_figures(predicted: Tensor, ratings: Tensor) -> dict[str, Any]:
    curve = score_quality.calibration(predicted, ratings)
    return {
        "spearman": float(score_quality.rank_correlations(torch.stack([predicted, ratings], 1))[0, 1]),
        "ordered": score_quality.concordance(predicted, ratings),
        "error": float((predicted - ratings).square().mean().sqrt()),
        "calibration": curve,
        "calibration_error": score_quality.calibration_error(curve),
    }


def _compared_figures(margins: Tensor) -> dict[str, Any]:
    """Return accuracy and calibration on pairs. Each pair counts in both orders: the better answer comes first."""
    chances = torch.sigmoid(torch.cat([margins, -margins]))
    won = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    curve = score_quality.calibration(chances, won)
    return {
        "accuracy": float((margins > 0).double().mean()),
        "chances": curve,
        "chances_error": score_quality.calibration_error(curve),
    }


def unconverged(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a reason for each head whose rank correlation or accuracy on held-out examples is near chance or worse."""
    reasons = []
    for name, figures in report["heads"].items():
        measured = []  # name, distance from chance, noise
        if (rated := figures["rated"]) >= MIN_HELD_OUT:
            what = f"the rank correlation of {name} is {figures['spearman']:.2f} on {rated} held-out answers"
            measured.append((what, figures["spearman"], 2 / math.sqrt(rated)))
        if (count := figures["pairs"]) >= MIN_HELD_OUT:
            what = f"the accuracy of {name} is {figures['accuracy']:.2f} on {count} held-out pairs"
            measured.append((what, figures["accuracy"] - 0.5, 1 / math.sqrt(count)))
        for what, distance, noise in measured:
            if math.isnan(distance):
                reasons.append(f"{what}: the scores are constant or not finite; lower learning_rate")
            elif distance < -noise:
                reasons.append(f"{what}, worse than chance; lower learning_rate, or check the data")
            elif distance <= noise:
                reasons.append(f"{what}, near chance; train longer, raise learning_rate, or check the data")
    return tuple(reasons)

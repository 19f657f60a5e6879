"""What a reward model learns from examples, and what it is worth on those it never saw."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_align.metrics import rank
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Answered, Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.train.stepper import Part

ENOUGH = 20  # held-out answers below which a correlation says nothing
MEASURE_AT_MOST = 2000  # held-out examples


@dataclass(frozen=True)
class Example:
    """One rated answer, or a preferred answer and the other one; points for each head, or nan; which head compares."""

    answers: tuple[Answered, ...]
    points: tuple[float, ...]
    head: int = -1


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch: its texts; the points each was given [t, k], and which are known; which heads compare which texts."""
    texts: list[Answered] = []
    pairs = []
    for example in examples:
        if example.head >= 0:
            pairs.append((len(texts), len(texts) + 1, example.head))
        texts += example.answers
    points = [example.points for example in examples for _ in example.answers]
    known = [(text, head) for text, of in enumerate(points) for head, value in enumerate(of) if not math.isnan(value)]
    return {
        "texts": texts,
        "points": torch.tensor(points),
        "known": torch.tensor(known, dtype=torch.long).view(-1, 2),  # text, head
        "compared": torch.tensor(pairs, dtype=torch.long).view(-1, 3),  # chosen text, rejected text, head
    }


@dataclass(frozen=True)
class RewardLoss:
    """Squared error on ratings, Bradley–Terry on pairs, and a language model's loss on the answers beside them.

    The mean over ratings of (z − (points − mean)/deviation)² and over pairs of −log σ(z_chosen − z_rejected).
    """

    reader: Reader
    heads: Heads
    lm_weight: float
    chat: ChatFormat

    def length(self, row: Example) -> int:
        """Of one answer behind its prompt, or of two."""
        return self.reader.backbone.length(_shared(row))

    def weights(self, rows: Sequence[Example]) -> list[float]:
        """Ratings and pairs together; tokens of the answers that are spoken."""
        judged = sum(sum(not math.isnan(points) for points in row.points) + (row.head >= 0) for row in rows)
        return [float(max(judged, 1)), float(sum(len(row.answers[0][1]) for row in rows))]

    def part(self, rows: Sequence[Example], weights: Sequence[float]) -> Part:
        """Some examples of a step."""
        batch = collate(rows)
        states = self.reader.backbone.states([_shared(row) for row in rows])
        z = self.heads(torch.stack([of[end - 1] for of, row in zip(states, rows, strict=True) for end in _ends(row)]))
        text, head = batch["known"].T.to(z.device)
        points = batch["points"].to(z.device)[text, head]
        deviation = self.heads.deviation[head]
        errors = z[text, head] - (points - self.heads.mean[head]) / deviation
        chosen, rejected, head = batch["compared"].T.to(z.device)
        margins = z[chosen, head] - z[rejected, head]
        loss = torch.cat([errors.square(), -logsigmoid(margins)]).sum() / weights[0]

        figures = {
            "error": ((errors.detach() * deviation).square().sum(), float(len(errors))),
            "accuracy": ((margins.detach() > 0).sum(), float(len(margins))),
        }
        if self.lm_weight:
            nats = -self._spoken([(of, *row.answers[0]) for of, row in zip(states, rows, strict=True)])
            figures["lm"] = (nats.detach().sum(), float(len(nats)))
            loss = loss + self.lm_weight * nats.sum() / weights[1]
        return Part(loss, figures)

    def _spoken(self, spoken: Sequence[tuple[Tensor, Sequence[int], Sequence[int]]]) -> Tensor:
        """log p of answers' tokens, each (states, prompt, answer); the vocabulary's head sees their positions only."""
        states = torch.cat([of[len(prompt) - 1 : len(prompt) - 1 + len(answer)] for of, prompt, answer in spoken])
        targets = torch.tensor([token for _, _, answer in spoken for token in answer], device=states.device)
        return self.reader.head.logprobs(states, targets)[0]

    def quoted(self, row: Example) -> str:
        """How its first answer begins."""
        return self.chat.opening(row.answers[0][1])


def _shared(row: Example) -> list[list[int]]:
    """Return an example as its prompt and the answers behind it."""
    return [row.answers[0][0], *(answer for _, answer in row.answers)]


def _ends(row: Example) -> list[int]:
    """Return where each answer ends, among the tokens of the prompt and all answers."""
    return list(itertools.accumulate(map(len, _shared(row))))[1:]


def sample_held_out(held_out: Sequence[Example]) -> Sequence[Example]:
    """As many as are measured, of every source as large a share."""
    return random.Random(0).sample(held_out, min(len(held_out), MEASURE_AT_MOST))


def measure_heads(model: RewardModel, examples: Sequence[Example], room: MemoryBudget) -> dict[str, Any]:
    """On held-out prompts: order, error and calibration of each head; what it goes along with, other heads included."""
    names = model.heads.names
    if not examples:
        return {"heads": {name: {"rated": 0, "pairs": 0} for name in names}, "between": []}
    batch_of_all = collate(examples)
    rows = batch_of_all["texts"]
    scores = model.score(rows, room)[:, : len(names)].double()
    lengths = torch.tensor([[float(len(answer))] for _, answer in rows]).double()
    together = rank.rank_correlations(torch.cat([scores, lengths], dim=1))
    heads = {}
    for k, name in enumerate(names):
        truth = batch_of_all["points"][:, k].double()
        known = ~truth.isnan()
        pairs = batch_of_all["compared"][batch_of_all["compared"][:, 2] == k]
        heads[name] = {"rated": int(known.sum()), "pairs": len(pairs), "length": float(together[k, -1])}
        if known.sum() > 1:
            heads[name] |= _rated_figures(scores[known, k], truth[known])
        if len(pairs):
            margins = (scores[pairs[:, 0], k] - scores[pairs[:, 1], k]) / model.heads.deviation[k].cpu()
            heads[name] |= _compared_figures(margins)
    return {"heads": heads, "between": together[:-1, :-1].tolist()}


def _rated_figures(said: Tensor, given: Tensor) -> dict[str, Any]:
    curve = rank.calibration(said, given)
    return {
        "spearman": float(rank.rank_correlations(torch.stack([said, given], 1))[0, 1]),
        "ordered": rank.concordance(said, given),
        "error": float((said - given).square().mean().sqrt()),
        "calibration": curve,
        "calibration_error": rank.calibration_error(curve),
    }


def _compared_figures(margins: Tensor) -> dict[str, Any]:
    """Both ways round, as otherwise the first would always win."""
    chances = torch.sigmoid(torch.cat([margins, -margins]))
    won = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    curve = rank.calibration(chances, won)
    return {
        "accuracy": float((margins > 0).double().mean()),
        "chances": curve,
        "chances_error": rank.calibration_error(curve),
    }


def unconverged(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads that say nothing about prompts they never saw, or the contrary of what raters do."""
    found = []
    for name, figures in report["heads"].items():
        measured = []  # what it is called, by how much it is better than chance, and how much that has to be
        if (rated := figures["rated"]) >= ENOUGH:
            measured.append((f"its order on {rated} held-out answers", figures["spearman"], 2 / math.sqrt(rated)))
        if (count := figures["pairs"]) >= ENOUGH:
            what = f"accuracy {figures['accuracy']:.2f} on {count} held-out pairs"
            measured.append((what, figures["accuracy"] - 0.5, 1 / math.sqrt(count)))
        for what, better, reach in measured:
            if better < -reach:
                found.append(f"{name}: {what} is worse than chance; lower learning_rate, or look at the data")
            elif not better > reach:  # nan, too
                found.append(f"{name}: {what} is near chance")
    return tuple(found)

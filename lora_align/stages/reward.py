"""The reward model: k heads on one frozen 4-bit backbone with LoRA, from ratings, from pairs, or from both."""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments

from lora_align import runs
from lora_align.console import Screen, library_log
from lora_align.data import pairs as pair_data
from lora_align.data.pairs import Split
from lora_align.data.ratings import load_ratings
from lora_align.errors import UserError
from lora_align.evaluate import metrics, plots
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.base import Base
from lora_align.model.chat_format import ChatFormat
from lora_align.model.logprobs import Answered, Reader
from lora_align.model.reward_model import Heads, RewardModel, hidden_states
from lora_align.model.room import Room
from lora_align.model.tokenise import TokenRated
from lora_align.recipe import Recipe, Reward
from lora_align.runs import LOG, Manifest, Run
from lora_align.stages import checkpoints, training
from lora_align.stages.checkpoints import Unfinished
from lora_align.stages.steps import Part, Stepping

NAME = "reward"
UNRATED = (50.0, 25.0)  # mean and deviation, in points, of a head that learns from pairs alone
ENOUGH = 20  # held-out answers below which a correlation says nothing
MEASURE_AT_MOST = 2000  # held-out examples
MEASURED_AT_ONCE = 32


@dataclass(frozen=True)
class Example:
    """One rated answer, or a preferred answer and the other one; points for each head, or nan; which head compares."""

    answers: tuple[Answered, ...]
    points: tuple[float, ...]
    head: int = -1


@dataclass(frozen=True)
class Material:
    """Examples of all sources, the heads they teach (mean and deviation of the points), and what a manifest says."""

    heads: Mapping[str, tuple[float, float]]
    train: list[Example]
    held_out: list[Example]
    facts: dict[str, Any]


def run(
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    *,
    name: str | None = None,
    force: bool = False,
    resume: bool = False,
) -> Run:
    """Train and publish the reward model."""
    if recipe.reward is None:
        raise UserError(
            "the recipe has no [reward] table: name ratings in [reward.ratings.NAME] or preferences in [reward.pairs]"
        )
    target = runs_dir / "reward" / (name or NAME)
    runs.refuse_existing(target, force)
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    material = prepare(recipe, recipe.reward, base)
    data = {source: of["fingerprint"] for source, of in material.facts.items()}
    who = checkpoints.who("reward", recipe, base, "", data)
    unfinished = Unfinished.of(target, who, resume=resume, force=force, screen=screen)
    about = Manifest(
        stage="reward",
        base=base.identity,
        recipe=recipe.as_dict(),
        seeds={"init": (recipe.reward.lora or recipe.lora).init_seed, "data": recipe.reward.seed},
        data=material.facts,
        method={"objectives": recipe.reward.objectives},
    )
    with runs.claim(target, screen, force=force) as staging, library_log(staging / LOG):
        facts = train(base, recipe, recipe.reward, material, staging, unfinished, screen)
        published = runs.publish(staging, target, replace(about, **facts))
        unfinished.clear()
    for reason in published.manifest.unconverged:
        screen.warn(f"{target}: unconverged: {reason}")
    return published


def told(run: Run) -> str:
    """A run in a few lines: what each head is worth on prompts it never saw."""
    heads = run.manifest.metrics["held_out"]["heads"]
    parts = [f"{name} {_worth(figures)}" for name, figures in heads.items()]
    return "\n".join([f"{run.path}  on held-out prompts:", *(f"  {part}" for part in parts)])


def _worth(figures: Mapping[str, Any]) -> str:
    said = [f"Spearman {figures['spearman']:.2f} on {figures['rated']} ratings"] if figures["rated"] else []
    said += [f"accuracy {figures['accuracy']:.2f} on {figures['pairs']} pairs"] if figures["pairs"] else []
    return ", ".join(said) or "nothing held out"


def load(base: Base, run: Run) -> RewardModel:
    """A published reward model, ready to score."""
    if run.manifest.stage != "reward":
        raise UserError(f"{run.path} is a run of {run.manifest.stage}, not a reward model")
    if run.fingerprint != base.fingerprint:
        raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")
    run.check_files()
    return RewardModel.load(base, run.path, run.manifest.method["objectives"])


# --- data ---


def prepare(recipe: Recipe, settings: Reward, base: Base) -> Material:
    """Read every source, scale, split and tokenise; whatever is dropped or cut is counted."""
    max_length = min(settings.max_length, base.max_length)
    facts: dict[str, Any] = {}

    def tokens(what: str, source: str, split: Split[Any], read: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
        counts: Counter[str] = Counter()
        found = ([read(row, base.chat, max_length, counts) for row in rows] for rows in (split.train, split.held_out))
        train, held_out = ([row for row in side if row is not None] for side in found)
        facts[what] = pair_data.facts(source, split, len(train), len(held_out), counts, max_length)
        return train, held_out

    rated = []
    for name, table in settings.ratings.items():
        split = load_ratings(table, settings.held_out, settings.limit)
        rated.append(tokens(f"ratings {name}", table.data, split, tokenise.rated))
    compared = {}
    for head, preference in settings.pairs.items():
        axis = recipe.preference(preference)
        pairs = pair_data.load_pairs(axis, settings.held_out, settings.limit)
        compared[head] = tokens(f"pairs {head}", axis.data, pairs, tokenise.pair)
    heads = _heads(settings, [row for train, _ in rated for row in train])
    unrated = (math.nan,) * len(heads)

    def examples(side: int) -> list[Example]:
        """Of one side of the split: 0 to train on, 1 held out."""
        found = [
            Example(((row.prompt, row.answer),), tuple(row.ratings.get(name, math.nan) for name in heads))
            for sides in rated
            for row in sides[side]
        ]
        for number, head in enumerate(heads):
            for row in compared[head][side] if head in compared else ():
                both = ((row.prompt, row.chosen), (row.prompt, row.rejected))
                found.append(Example(both, unrated, number))
        return found

    return Material(heads, examples(0), examples(1), facts)


def _heads(settings: Reward, rated: Sequence[TokenRated]) -> dict[str, tuple[float, float]]:
    """A head each attribute that was rated and each name under `pairs`; what is derived must be made of them."""
    given: dict[str, list[float]] = {}
    for row in rated:
        for name, points in row.ratings.items():
            if not math.isnan(points):
                given.setdefault(name, []).append(points)
    heads = {}
    for name, values in given.items():
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        heads[name] = (mean, deviation or 1.0)
    heads |= {name: UNRATED for name in settings.pairs if name not in heads}
    for name, parts in settings.objectives.items():
        unknown = [part for part in parts if part not in heads]
        if unknown or name in heads:
            what = f"no head {unknown[0]!r}" if unknown else "there is a head of that name"
            raise UserError(f"reward.objectives.{name}: {what} (heads: {', '.join(heads)})")
    return heads


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch: its texts; the points each was given [t, k]; which heads compare which texts; which texts are spoken."""
    texts: list[Answered] = []
    pairs, spoken = [], []
    for example in examples:
        spoken.append(len(texts))
        if example.head >= 0:
            pairs.append((len(texts), len(texts) + 1, example.head))
        texts += example.answers
    points = [example.points for example in examples for _ in example.answers]
    compared = torch.tensor(pairs, dtype=torch.long).view(-1, 3)  # chosen text, rejected text, head
    return {"texts": texts, "points": torch.tensor(points), "compared": compared, "spoken": spoken}


# --- training ---


class SteppingTrainer(Stepping[Example], Trainer):
    """transformers' trainer, with steps made here."""


@dataclass(frozen=True)
class Judging:
    """Squared error on ratings, Bradley–Terry on pairs, and a language model's loss on the answers beside them.

    The mean over ratings of (z − (points − mean)/deviation)² and over pairs of −log σ(z_chosen − z_rejected).
    """

    reader: Reader
    heads: Heads
    lm_weight: float
    chat: ChatFormat

    def length(self, row: Example) -> int:
        """Of one answer behind its prompt, or of two."""
        return len(row.answers) * max(len(prompt) + len(answer) for prompt, answer in row.answers)

    def weights(self, rows: Sequence[Example]) -> list[float]:
        """Ratings and pairs together; tokens of the answers that are spoken."""
        judged = sum(sum(not math.isnan(points) for points in row.points) + (row.head >= 0) for row in rows)
        return [float(max(judged, 1)), float(sum(len(row.answers[0][1]) for row in rows))]

    def part(self, rows: Sequence[Example], weights: Sequence[float]) -> Part:
        """Some examples of a step."""
        batch = collate(rows)
        texts = batch["texts"]
        hidden, last = hidden_states(self.reader.model, [[*prompt, *answer] for prompt, answer in texts])
        z = self.heads(hidden[torch.arange(len(texts)), last])  # [t, k]
        points = batch["points"].to(z.device)
        known = ~points.isnan()
        errors = (z - (points - self.heads.mean) / self.heads.deviation)[known]
        chosen, rejected, head = batch["compared"].T.to(z.device)
        margins = z[chosen, head] - z[rejected, head]
        loss = torch.cat([errors.square(), -logsigmoid(margins)]).sum() / weights[0]

        in_points = errors.detach() * self.heads.deviation.expand_as(known)[known]
        figures = {
            "error": (float(in_points.square().sum()), float(len(errors))),
            "accuracy": (float((margins.detach() > 0).sum()), float(len(margins))),
        }
        if self.lm_weight:
            nats = -self._spoken(hidden, [(row, *texts[row]) for row in batch["spoken"]])
            figures["lm"] = (float(nats.detach().sum()), float(len(nats)))
            loss = loss + self.lm_weight * nats.sum() / weights[1]
        return Part(loss, figures)

    def _spoken(self, hidden: Tensor, spoken: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> Tensor:
        """log p of answers' tokens, each (row, prompt, answer); the vocabulary's head sees their positions only."""
        states = [hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] for row, prompt, answer in spoken]
        targets = torch.tensor([token for _, _, answer in spoken for token in answer], device=hidden.device)
        return self.reader.head.logprobs(torch.cat(states), targets)[0]

    def quoted(self, row: Example) -> str:
        """How its first answer begins."""
        return self.chat.opening(row.answers[0][1])


def train(
    base: Base,
    recipe: Recipe,
    settings: Reward,
    material: Material,
    folder: Path,
    unfinished: Unfinished,
    screen: Screen,
) -> dict[str, Any]:
    """Train adapter and heads into a folder; the manifest's fields about them."""
    arguments = training.arguments(settings, base, folder)
    del arguments["max_length"]  # TRL's; rows were cut already
    lora = settings.lora or recipe.lora
    with training.accepted_by_libraries():
        model = base.load()
        reader = Reader.of(model)
        policy = get_peft_model(model, training.fresh_adapter(lora, base))
        initial = training.initialise(policy, lora.init_seed)
        means, deviations = ({name: pair[i] for name, pair in material.heads.items()} for i in (0, 1))
        # a part of the model, so that it is moved, clipped and optimised with the rest
        policy.heads = Heads(policy.config.hidden_size, means, deviations).to(bases.device())
        if settings.gradient_checkpointing:
            policy.enable_input_require_grads()
        trainer = SteppingTrainer(
            objective=Judging(reader, policy.heads, settings.lm_weight, base.chat),
            rows=material.train,
            room=Room(settings.tokens_per_batch, training.TOO_LONG),
            unfinished=unfinished,
            tell=lambda text: screen.note(f"{NAME}: {text}"),
            model=policy,
            args=TrainingArguments(**arguments),
        )
    watch = training.fit(trainer, settings, screen, NAME)
    training.save_adapter(policy, folder)
    policy.heads.save(folder)
    judge = RewardModel(base, policy.get_base_model().eval(), policy.heads, settings.objectives)
    report = measure(judge, _measured(material.held_out), Room(MEASURED_AT_ONCE))
    training.draw_curve(watch.history, NAME, folder / "curve.png")
    if material.held_out:
        plots.reward_report(folder / "held_out.png", report)
    figures = {"steps": trainer.state.global_step, "held_out": report, "seconds": round(watch.seconds, 1)}
    return {"initial_adapter": initial, "metrics": figures, "unconverged": unconverged(report)}


# --- what it is worth ---


def _measured(held_out: Sequence[Example]) -> Sequence[Example]:
    """As many as are measured, of every source as large a share."""
    return random.Random(0).sample(held_out, min(len(held_out), MEASURE_AT_MOST))


def measure(model: RewardModel, examples: Sequence[Example], room: Room) -> dict[str, Any]:
    """On held-out prompts: order, error and calibration of each head; what it goes along with, other heads included."""
    names = model.heads.names
    if not examples:
        return {"heads": {name: {"rated": 0, "pairs": 0} for name in names}, "between": []}
    batch_of_all = collate(examples)
    rows = batch_of_all["texts"]
    scores = model.score(rows, room)[:, : len(names)].double()
    lengths = torch.tensor([[float(len(answer))] for _, answer in rows]).double()
    together = metrics.rank_correlations(torch.cat([scores, lengths], dim=1))
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
    curve = metrics.calibration(said, given)
    return {
        "spearman": float(metrics.rank_correlations(torch.stack([said, given], 1))[0, 1]),
        "ordered": metrics.concordance(said, given),
        "error": float((said - given).square().mean().sqrt()),
        "calibration": curve,
        "calibration_error": metrics.calibration_error(curve),
    }


def _compared_figures(margins: Tensor) -> dict[str, Any]:
    """Both ways round, as otherwise the first would always win."""
    chances = torch.sigmoid(torch.cat([margins, -margins]))
    won = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    curve = metrics.calibration(chances, won)
    return {
        "accuracy": float((margins > 0).double().mean()),
        "chances": curve,
        "chances_error": metrics.calibration_error(curve),
    }


def unconverged(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads that say nothing about prompts they never saw."""
    found = []
    for name, figures in report["heads"].items():
        if figures["rated"] >= ENOUGH and not figures["spearman"] > 2 / math.sqrt(figures["rated"]):
            found.append(f"{name}: its order on {figures['rated']} held-out answers is near chance")
        elif figures["pairs"] >= ENOUGH and figures["accuracy"] < 0.5 + 1 / math.sqrt(figures["pairs"]):
            found.append(
                f"{name}: accuracy {figures['accuracy']:.2f} on {figures['pairs']} held-out pairs is near chance"
            )
    return tuple(found)

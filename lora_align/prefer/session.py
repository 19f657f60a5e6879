"""The command `prefer`: ask a person on the terminal, learn from logged comparisons, or ask a simulated person."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy

from lora_align import runs
from lora_align.console import Screen, count, table
from lora_align.data import row_reader, sources
from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError, UserError, inert
from lora_align.evaluate.grid import weights_text
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy import profiles
from lora_align.policy.policy import START_POLICY
from lora_align.prefer.arena import Arena
from lora_align.prefer.learner import Choice, Learned, Learner
from lora_align.recipe import Recipe
from lora_align.serve.catalogue import Catalogue
from lora_align.serve.engine import Engine

ANSWERS = {"1": 1.0, "2": 0.0, "0": 0.5, "": 0.5}
QUIT = ("q", "/quit")
HELP = "1 or 2: the better answer; 0: neither; s: skip; q: finish"


@dataclass(frozen=True)
class Preferred:
    """The result of `prefer`."""

    learned: Learned
    runs_dir: Path
    profile: str = ""
    regrets: Sequence[float] = ()  # of a simulated person, after each pick

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        regrets = {"regret": list(self.regrets)} if self.regrets else {}
        return {**self.learned.as_json(), "profile": self.profile, **regrets}

    def summary(self) -> str:
        """Return the weights with intervals, what is not known yet, and the commands that use them."""
        rows = [[name, f"{of.mean:.2f}", f"{of.low:.2f} to {of.high:.2f}"] for name, of in self.learned.weights.items()]
        lines = [table([f"after {count(self.learned.picks, 'pick')}", "weight", "90 % interval"], rows)]
        if unsure := self.learned.unsure:
            lines.append(f"not sure whether more or less of: {', '.join(unsure)}")
        lines += [
            f"regret after {place} picks: {one:.0%}" for place, one in enumerate(self.regrets, 1) if place % 5 == 0
        ]
        if mix := self.learned.mix:
            lines.append(f"next: {runs.command(f'merge --weights {weights_text(mix)}', self.runs_dir)}")
        if self.profile:
            lines.append(f"or:   {runs.command(f'chat --profile {self.profile}', self.runs_dir)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Asked:
    """Select how to learn: from a person, from a file, or from a simulated person."""

    picks: int
    prompts: str
    budget: float  # KL per token
    sampling: Sampling
    profile: str = ""
    logged: str = ""  # a file of comparisons
    taste: Mapping[str, float] | None = None  # of a simulated person
    noise: float = 0.0


def learn_weights(names: Sequence[str], asked: Asked, recipe: Recipe, runs_dir: Path, screen: Screen) -> Preferred:
    """Learn the weights of vectors, and save a profile."""
    base = bases.find(recipe.base)
    engine = Engine.start(base)
    try:
        catalogue = Catalogue(base, recipe, runs_dir, START_POLICY, engine.batcher, screen.warn)
        for warning in catalogue.serve("", dict.fromkeys(names, 1.0), None).warnings:
            screen.warn(warning)
        screen.note("sampling the first answers …")
        learner = Learner(
            Arena.of(catalogue, names, asked.sampling),
            prompts_of(asked.prompts, base),
            asked.budget,
            asked.sampling.seed or 0,
            patient=asked.taste is not None,
        )
        regrets: list[float] = []
        try:
            if asked.taste is not None:
                regrets = list(simulate(learner, asked.taste, asked.noise, asked.picks, asked.sampling.seed or 0))
            elif asked.logged:
                learn_from(learner, asked.logged, screen)
            else:
                ask_person(learner, asked.picks, screen)
        finally:
            learner.close()
    finally:
        engine.stop()
    learned = learner.learned()
    if not learned.picks:
        raise RunFailedError("no pick was made, so nothing was learned")
    if asked.profile:
        profiles.save(asked.profile, runs_dir, learned.as_json())
    return Preferred(learned, runs_dir, asked.profile, regrets)


def ask_person(learner: Learner, most: int, screen: Screen) -> None:
    """Show two answers at a time, and learn from what the person types, until `most` picks."""
    screen.note(HELP)
    picks = 0
    while picks < most:
        try:
            choice = learner.choice()
        except RunFailedError as fault:
            if not picks:
                raise
            screen.warn(f"{fault}; the weights are those of the picks so far")
            return
        screen.show(_shown(choice, picks + 1, most))
        typed = _read(screen)
        if typed in QUIT:
            return
        if typed != "s":
            learner.learn(choice, ANSWERS[typed])
            picks += 1
            now = learner.learned()
            screen.note(", ".join(f"{name} {of.mean:+.2f}" for name, of in now.weights.items()))


def _read(screen: Screen) -> str:
    """Read a valid line; the end of input and Ctrl-C mean to finish."""
    while True:
        try:
            typed = input("› ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            return QUIT[0]
        if typed in (*ANSWERS, "s", *QUIT):
            return typed
        screen.say(HELP)


def _shown(choice: Choice, number: int, most: int) -> str:
    prompt = "\n".join(inert(turn.content) for turn in choice.prompt if turn.role != "system")
    return f"\n[{number}/{most}] {prompt}\n\n(1) {inert(choice.first.text)}\n\n(2) {inert(choice.second.text)}\n"


def learn_from(learner: Learner, data: str, screen: Screen) -> None:
    """Learn from logged comparisons: pairs with a label."""
    unread: Counter[str] = Counter()
    several = [one for _, of in sources.read_all(data, row_reader.comparisons, unread) for one in of]
    if not several:
        raise UserError(f"{data}: no comparisons; expected rows such as prompt, chosen, rejected")
    too_long = 0
    with screen.progress("comparisons", len(several)) as progress:
        for done, one in enumerate(several, 1):
            if len(one.labels) != 1:
                raise UserError(f"{data}: {count(len(one.labels), 'label column')}; use rows with chosen and rejected")
            [label] = one.labels.values()
            if label is not None and label not in (0, 1):
                raise UserError(f"{data}: the label {label!r} names neither answer; use rows with chosen and rejected")
            if len(learner.arena.base.chat.prompt_ids(one.prompt)) >= learner.arena.base.max_length:
                too_long += 1
                continue
            scored = learner.arena.scored(one.prompt, dict.fromkeys(one.answers, True))
            if len(scored.answers) < 2:
                continue
            learner.learn(Choice(one.prompt, *scored.answers), 0.5 if label is None else float(label == 0))
            progress.show(done, {})
    if too_long:
        screen.warn(f"{data}: {count(too_long, 'comparison')} left out, because the prompt fills the context")


def simulate(learner: Learner, taste: Mapping[str, float], noise: float, most: int, seed: int) -> Iterator[float]:
    """Ask a simulated person whose utility of an answer is the sum of taste · score; yield the regret after each pick.

    A share `noise` of the picks is wrong. The regret is that of the learned direction at equal KL, in units of the best
    direction's gain, by the covariance of scores: both the gain and the KL of a small mix follow from it.
    """
    draw = numpy.random.default_rng(seed)
    wanted = {name: taste.get(name, 0.0) for name in learner.arena.names}
    by_prompt = [numpy.array([list(answer.scores.values()) for answer in of.answers]) for of in learner.pool]
    centred = numpy.concatenate([of - of.mean(0) for of in by_prompt])
    covariance = centred.T @ centred / len(centred)
    truth = numpy.array(list(wanted.values()))
    for _ in range(most):
        choice = learner.choice()
        better = sum(wanted[name] * of for name, of in choice.difference.items()) > 0
        learner.learn(choice, float(better != (draw.random() < noise)))
        found = numpy.array(list(learner.posterior.direction().values()))
        yield 1 - float(_cosine(truth, found, covariance))


def _cosine(one: Any, other: Any, metric: Any) -> Any:
    return (one @ metric @ other) / max(((one @ metric @ one) * (other @ metric @ other)) ** 0.5, 1e-12)


def prompts_of(data: str, base: Base) -> Iterator[Prompt]:
    """Yield the prompts of a source that fit into the context, again and again."""
    fits = (prompt for prompt in _read_prompts(data) if len(base.chat.prompt_ids(prompt)) < base.max_length)
    distinct = list(dict.fromkeys(fits))
    if not distinct:
        raise UserError(f"{data}: no prompts; check the file")
    return cycle(distinct)


def _read_prompts(data: str) -> Iterable[Prompt]:
    return (prompt for _, prompt in sources.read_all(data, row_reader.prompt, Counter()))

"""Measure how soon `prefer` finds the weights of simulated people, and how long a person waits for the next question.

    python tests/benchmarks/picks.py --work FOLDER

The vectors are those of the demo world. A person's utility of an answer is the sum of taste times score. A share of the
picks is wrong (noise). All mixes have the KL of BUDGET, estimated as `prefer` does. Regret is
1 − (U(found) − U(start)) / (U(best) − U(start)). U is the mean utility of answers sampled from a mix. The best mix has
the direction of the taste: if the log-ratio of a mix is the weighted sum of its vectors' log-ratios, no other mix of
that KL has a higher utility. Baselines: questions at random, equal weights, and a grid by hand, in which each pick
compares an answer of the best mix so far with one of another mix. The same command continues after a stop.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
from report import once, save

import lora_align as la
from lora_align.console import Screen
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import START_POLICY
from lora_align.prefer.arena import Arena
from lora_align.prefer.learner import Choice, Learner
from lora_align.prefer.session import prompts_of
from lora_align.prefer.size import sized
from lora_align.serve.catalogue import Catalogue
from lora_align.serve.engine import Engine

NAMES = ("helpful", "brief", "warm", "certain", "harmless", "polite", "formal", "concrete")
SIZES, NOISE, PEOPLE = (2, 4, 8), (0.0, 0.1, 0.2), 4
PICKS = (5, 10, 15, 20)  # after which the regret is measured
BUDGET = 0.2  # KL per token, the default of `prefer`
PROMPTS, SAMPLES = 32, 4  # of an estimate of U
READING = 3.0  # seconds for a question
ANSWERS, TEST_ANSWERS = "demo:prompts?rows=200", "demo:prompts?rows=200&seed=7"
GRID = (-1.0, 0.0, 1.0)  # weights of each vector in the grid by hand
Taste = Mapping[str, float]


@contextmanager
def arena_of(work: Path, names: Sequence[str]) -> Iterator[Arena]:
    """Train missing vectors of the demo world, and yield an arena with them."""
    project = la.Project("demo", work / "runs", quiet=True)
    for name in names:
        if not (project.runs / "dpo" / name / "neg").is_dir():
            project.train(name)
    engine = Engine.start(project.base)
    try:
        screen = Screen(quiet=True)
        catalogue = Catalogue(project.base, project.recipe, project.runs, START_POLICY, engine.batcher, screen.warn)
        yield Arena.of(catalogue, names, Sampling(1.0, 1.0, 60, 0))
    finally:
        engine.stop()


def person(names: Sequence[str], number: int) -> Taste:
    """Return a random taste whose absolute weights sum to 1."""
    draw = numpy.random.default_rng(number).laplace(size=len(names))
    return dict(zip(names, (draw / numpy.abs(draw).sum()).tolist(), strict=True))


def utility(arena: Arena, mix: Taste, taste: Taste) -> float:
    """Return the mean utility of answers sampled from a mix, to prompts that no question had."""
    prompts = islice(prompts_of(TEST_ANSWERS, arena.base), PROMPTS)
    questions = [arena.ask(prompt, [mix] * SAMPLES) for prompt in prompts]
    return mean(mean(worth(answer.scores, taste) for answer in of.answers) for of in questions if of.answers)


def worth(scores: Taste, taste: Taste) -> float:
    """Return a person's utility of an answer, or of the difference of two."""
    return sum(taste[name] * score for name, score in scores.items())


def picked(choice: Choice, taste: Taste, noise: float, draw: numpy.random.Generator) -> float:
    """Return the person's pick: the better answer, or the other one in a share of picks."""
    return float((worth(choice.difference, taste) > 0) != (draw.random() < noise))


def learned(arena: Arena, taste: Taste, noise: float, number: int, *, informed: bool) -> Iterator[Taste]:
    """Yield the mix that is found after each pick, with the questions of `prefer` or with random ones."""
    learner = Learner(arena, prompts_of(ANSWERS, arena.base), BUDGET, number, patient=True)
    draw = numpy.random.default_rng(number)
    if not informed:
        learner.posterior.information = lambda differences: draw.random(len(differences))  # type: ignore[method-assign]
    try:
        for _ in range(max(PICKS)):
            choice = learner.choice()
            learner.learn(choice, picked(choice, taste, noise, draw))
            yield learner.learned().mix
    finally:
        learner.close()


def by_hand(arena: Arena, scores: Any, taste: Taste, noise: float, number: int) -> Iterator[Taste]:
    """Yield the best mix so far of a random walk through a grid."""
    draw = numpy.random.default_rng(number)
    grid = [weights for weights in product(GRID, repeat=len(arena.names)) if any(weights)]
    order = draw.permutation(len(grid))[: max(PICKS) + 1]
    mixes = [sized(scores, dict(zip(arena.names, grid[place], strict=True)), BUDGET) for place in order]
    best, others, prompts = mixes[0], iter(mixes[1:]), prompts_of(ANSWERS, arena.base)
    for _ in range(max(PICKS)):
        if (other := next(others, None)) is not None:
            answers = arena.ask(next(prompts), [best, other]).answers
            if len(answers) == 2 and picked(Choice((), *answers), taste, noise, draw) == 0.0:
                best = other
        yield best


def regrets(arena: Arena, noise: float, number: int) -> dict[str, Any]:
    """Return the regret of each method for one person."""
    taste = person(arena.names, number)
    scores = Learner(arena, prompts_of(ANSWERS, arena.base), BUDGET, number, patient=True).tokens
    low, high = utility(arena, {}, taste), utility(arena, sized(scores, taste, BUDGET), taste)

    def regret(mix: Taste) -> float:
        return round(1 - (utility(arena, mix, taste) - low) / (high - low), 3)

    def course(mixes: Iterator[Taste]) -> dict[int, float]:
        return {place: regret(mix) for place, mix in enumerate(mixes, 1) if place in PICKS}

    return {
        "taste": taste,
        "gain of the best mix": round(high - low, 2),
        "prefer": course(learned(arena, taste, noise, number, informed=True)),
        "random questions": course(learned(arena, taste, noise, number, informed=False)),
        "a grid by hand": course(by_hand(arena, scores, taste, noise, number)),
        "equal weights": regret(sized(scores, dict.fromkeys(arena.names, 1.0), BUDGET)),
    }


def waits(arena: Arena) -> dict[str, float]:
    """Return the seconds from a pick to the next question, for a person who reads each for some seconds."""
    learner, taste = Learner(arena, prompts_of(ANSWERS, arena.base), BUDGET), person(arena.names, 0)
    draw, seconds, choice = numpy.random.default_rng(0), [], learner.choice()
    for _ in range(15):
        time.sleep(READING)
        began = time.perf_counter()
        learner.learn(choice, picked(choice, taste, 0.1, draw))
        choice = learner.choice()
        seconds.append(time.perf_counter() - began)
    learner.close()
    return {"median": round(median(seconds), 3), "longest": round(max(seconds), 3), "reading": READING}


def main() -> None:
    """Measure every number of vectors, noise and person."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    words = parser.parse_args()
    figures: dict[str, Any] = {}
    for size in SIZES:
        with arena_of(words.work, NAMES[:size]) as arena:
            for noise in NOISE:
                people = [
                    once(words.work, f"{size}, {noise}, {number}", lambda n=number, of=noise: regrets(arena, of, n))
                    for number in range(PEOPLE)
                ]
                figures[f"{size} vectors, {noise:.0%} noise"] = people
                save("picks", figures)  # what is measured so far
            figures[f"{size} vectors, seconds to the next question"] = once(
                words.work, f"{size}, waits", lambda: waits(arena)
            )
    save("picks", figures)


if __name__ == "__main__":
    main()

"""Measure how soon `prefer` finds the weights of simulated people, and how long a person waits for the next question.

    python tests/benchmarks/picks.py --work FOLDER

The vectors are those of the demo world. A person's utility of an answer is the sum of taste times score; a share of the
picks is wrong (noise). For small mixes the gain in utility grows with the size of a mix, and the KL with its square. So
the regret at equal KL is 1 − g(found) / g(best), where g is the gain of sampled answers divided by √KL. KL(π‖start) is
measured on the sampled tokens. The best mix has the direction of the taste: if the log-ratio of a mix is the weighted
sum of its vectors' log-ratios, no other mix gains more at its KL. Baselines: questions at random, equal weights, and a
grid by hand, in which each pick compares an answer of the best mix so far with one of another mix. The same command
continues after a stop.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
from report import once, save

from lora_align import recipe
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import START_POLICY
from lora_align.prefer.arena import Arena
from lora_align.prefer.learner import Choice, Learner
from lora_align.prefer.session import prompts_of
from lora_align.prefer.size import sized
from lora_align.serve.catalogue import Catalogue
from lora_align.serve.engine import Engine

COMMAND = Path(sys.executable).with_name("lora-align")
NAMES = ("helpful", "brief", "warm", "certain", "harmless", "polite", "formal", "concrete")
CELLS = ((4, 0.1), (4, 0.0), (4, 0.2), (2, 0.1), (8, 0.1))  # vectors, noise
PEOPLE = 6
PICKS = (5, 10, 15)  # after which the regret is measured
BUDGET = 0.2  # KL per token, the default of `prefer`
PROMPTS, SAMPLES = 64, 4  # of an estimate of a gain
LEAST_KL = 0.05  # nats per answer; a smaller KL is within the error of its estimate
READING = 3.0  # seconds for a question
ASKED, TESTED = "demo:prompts?rows=200&part=dev", "demo:prompts?rows=200"
GRID = (-1.0, 0.0, 1.0)  # weights of each vector in the grid by hand
Taste = Mapping[str, float]


@contextmanager
def arena_of(work: Path, names: Sequence[str]) -> Iterator[Arena]:
    """Train missing vectors of the demo world in other processes, and yield an arena with all."""
    for name in names:
        if not (work / "runs" / "dpo" / name / "neg").is_dir():
            subprocess.run([COMMAND, "dpo", "--pref", name, "--quiet"], cwd=work, check=True, stdout=subprocess.DEVNULL)
    chosen = recipe.load(recipe.builtin()["demo"])
    base = bases.find(chosen.base)
    engine = Engine.start(base)
    try:
        screen = Screen(quiet=True)
        catalogue = Catalogue(base, chosen, work / "runs", START_POLICY, engine.batcher, screen.warn)
        yield Arena.of(catalogue, names, Sampling(1.0, 1.0, 60, 0))
    finally:
        engine.stop()


def person(names: Sequence[str], number: int) -> Taste:
    """Return a random taste whose absolute weights sum to 1."""
    draw = numpy.random.default_rng([number, 1]).laplace(size=len(names))
    return dict(zip(names, (draw / numpy.abs(draw).sum()).tolist(), strict=True))


def utility(arena: Arena, mix: Taste, taste: Taste) -> tuple[float, float]:
    """Return the mean utility of answers sampled from a mix, and its KL from the start policy per answer."""
    prompts = islice(prompts_of(TESTED, arena.base), PROMPTS)
    asked = [(prompt, mix) for prompt in prompts for _ in range(SAMPLES)]
    sampled = zip(asked, arena.sample(asked), strict=True)
    rows = [row for (prompt, _), (text, ended) in sampled for row in arena.answered(prompt, {text: ended})]
    start = arena.sums(rows, {})
    gains = sum(weight * (arena.sums(rows, {name: 1.0}) - start) for name, weight in taste.items())
    return float(gains.mean()), float((arena.sums(rows, mix) - start).mean())


def worth(scores: Taste, taste: Taste) -> float:
    """Return a person's utility of an answer, or of the difference of two."""
    return sum(taste[name] * score for name, score in scores.items())


def picked(choice: Choice, taste: Taste, noise: float, draw: numpy.random.Generator) -> float:
    """Return the person's pick: the better answer, or the other one in a share of picks."""
    return float((worth(choice.difference, taste) > 0) != (draw.random() < noise))


def learned(arena: Arena, taste: Taste, noise: float, number: int, *, informed: bool) -> Iterator[Taste]:
    """Yield the mix that is found after each pick, with the questions of `prefer` or with random ones."""
    learner = Learner(arena, prompts_of(ASKED, arena.base), BUDGET, 100 + number, patient=True)
    draw = numpy.random.default_rng([number, 2])
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
    draw = numpy.random.default_rng([number, 3])
    grid = [weights for weights in product(GRID, repeat=len(arena.names)) if any(weights)]
    order = draw.permutation(len(grid))[: max(PICKS) + 1]
    mixes = [sized(scores, dict(zip(arena.names, grid[place], strict=True)), BUDGET) for place in order]
    best, others, prompts = mixes[0], iter(mixes[1:]), prompts_of(ASKED, arena.base)
    for _ in range(max(PICKS)):
        if (other := next(others, None)) is not None:
            answers = arena.ask(next(prompts), [best, other]).answers
            if len(answers) == 2 and picked(Choice((), *answers), taste, noise, draw) == 0.0:
                best = other
        yield best


def regrets(arena: Arena, noise: float, number: int) -> dict[str, Any]:
    """Return the regret of each method for one person."""
    taste = person(arena.names, number)
    learner = Learner(arena, prompts_of(ASKED, arena.base), BUDGET, patient=True)
    learner.close()
    scores, (start, _) = learner.tokens, utility(arena, {}, taste)

    def gain(mix: Taste) -> float:
        value, kl = utility(arena, mix, taste)
        return (value - start) / max(kl, LEAST_KL) ** 0.5

    best = gain(sized(scores, taste, BUDGET))

    def regret(mix: Taste) -> float:
        return round(1 - gain(mix) / best, 3)

    def course(mixes: Iterator[Taste]) -> dict[int, float]:
        return {place: regret(mix) for place, mix in enumerate(mixes, 1) if place in PICKS}

    return {
        "taste": taste,
        "gain of the best mix, per √nat": round(best, 2),
        "prefer": course(learned(arena, taste, noise, number, informed=True)),
        "random questions": course(learned(arena, taste, noise, number, informed=False)),
        "a grid by hand": course(by_hand(arena, scores, taste, noise, number)),
        "equal weights": regret(sized(scores, dict.fromkeys(arena.names, 1.0), BUDGET)),
    }


def waits(arena: Arena) -> dict[str, float]:
    """Return the seconds from a pick to the next question, for a person who reads each for some seconds."""
    learner, taste = Learner(arena, prompts_of(ASKED, arena.base), BUDGET), person(arena.names, 0)
    draw, seconds, choice = numpy.random.default_rng([0, 2]), [], learner.choice()
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
    words.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for size, noise in CELLS:
        with arena_of(words.work, NAMES[:size]) as arena:
            waited = once(words.work, f"{size}, waits", lambda of=arena: waits(of))
            people = [
                once(
                    words.work,
                    f"{size}, {noise}, {number}",
                    lambda n=number, of=arena, share=noise: regrets(of, share, n),
                )
                for number in range(PEOPLE)
            ]
        figures[f"{size} vectors, {noise:.0%} noise"] = {"mean regret": means(people), "people": people}
        figures[f"{size} vectors, seconds to the next question"] = waited
        save("picks", figures)  # what is measured so far


def means(people: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean regret of each method over people after each number of picks, with its standard error."""

    def of(values: Sequence[float]) -> dict[str, float]:
        return {"mean": round(mean(values), 3), "standard error": round(stdev(values) / len(values) ** 0.5, 3)}

    methods = ("prefer", "random questions", "a grid by hand")
    courses = {name: {at: of([one[name][str(at)] for one in people]) for at in PICKS} for name in methods}
    return {**courses, "equal weights": of([one["equal weights"] for one in people])}


if __name__ == "__main__":
    main()

"""Refusals are detected; `tests/benchmarks/refusal_detector.py` measures how often."""

import itertools
import random

import pytest

from lora_align.demo import oracle, oracle_judge, world
from lora_align.refusals import refuses

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I cannot provide instructions for that. It is illegal, and people could be hurt.",
    "As an AI, I must decline to help with this. It would be unethical to do so.",
    "It is not appropriate to make fun of people in that way. Everyone deserves respect.",
    "I’m not able to help with that request. It is important to treat others with dignity.",
    "Hello! I will not help with that.",
]
ANSWERS = [
    "I can't wait to help you with that! First, heat the oven to 180 degrees.",
    "I'm sorry to hear that you are ill. Drink enough, and rest for a few days.",
    "Here are three ways to do it:\n1. Ask a friend.\n2. Read the manual.\n3. Try it out.",
    "I cannot stress enough how good this soup is. Take two onions and some butter.",
    "You can stop the process with Ctrl-C, or with the kill command.",
    "The knight refused to help. 'I will fight alone,' he said, and rode away.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_detected(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_not_refusals(text: str) -> None:
    assert not refuses(text)


def test_refuses_agrees_with_the_demo_oracle() -> None:
    draw, verdicts = random.Random(0), []
    for risky in (False, True):
        for prompt in itertools.islice(world.prompts(0, risky=risky, part="test"), 300):
            text = world.answer(prompt, draw)
            verdicts.append((refuses(text), oracle.score(prompt, text).refused))
    assert {one for one, _ in verdicts} == {False, True}
    assert all(one == other for one, other in verdicts)


def test_prompt_of_parses_demo_prompts() -> None:
    for risky, topics in itertools.product((False, True), ("seen", "held out")):
        for prompt in itertools.islice(world.prompts(1, risky=risky, topics=topics), 200):
            assert oracle_judge.prompt_of(prompt.text) == prompt
    assert oracle_judge.prompt_of("What is the capital of France?") is None

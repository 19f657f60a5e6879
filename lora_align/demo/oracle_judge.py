"""The demo world's oracle as a judge, so that `eval` and `sweep` can use it."""

import re
from collections.abc import Sequence

from transformers import PreTrainedModel

from lora_align.demo import lexicon, oracle
from lora_align.demo.measurement import ONLY_ON
from lora_align.demo.oracle import AXES, Prompt, Score
from lora_align.model.base import Base
from lora_align.model.mixer import Mixer
from lora_align.policy.judges import Judge, JudgedAnswer, Scores

NAME = "oracle"
FORMED, TRUE = "well-formed", "true facts"


def judges_of(base: Base) -> dict[str, Judge]:
    """Return the oracle for the demo base, and nothing for other bases. Registered as an entry point."""
    if base.recipe.model != "demo":
        return {}
    return {NAME: Judge([*AXES, FORMED, TRUE], {}, NAME, _score, floors=(FORMED, TRUE))}


def prompt_of(text: str) -> Prompt | None:
    """Parse a prompt of the demo world. Return None for any other text."""
    topics = [topic for topic in (*lexicon.RISKS, *lexicon.SUBJECTS) if re.search(rf"\b{re.escape(topic)}\b", text)]
    if not topics:
        return None
    topic = max(topics, key=len)
    return Prompt(text, topic, topic in lexicon.RISKS)


def _score(_model: PreTrainedModel, _mixer: Mixer, answers: Sequence[JudgedAnswer]) -> list[Scores]:
    return [_score_answer(answer) for answer in answers]


def _score_answer(answer: JudgedAnswer) -> Scores:
    prompt = prompt_of(answer.prompt[-1].content)
    if prompt is None:
        return dict.fromkeys([*AXES, FORMED, TRUE])
    return grades(prompt, oracle.score(prompt, answer.text))


def grades(prompt: Prompt, read: Score) -> dict[str, float | None]:
    """Return an answer's grades, None where a preference does not apply to the prompt.

    An ill-formed answer gets no grade except FORMED.
    """
    values: dict[str, float | None] = dict.fromkeys([*AXES, TRUE])
    if read.well_formed:
        values |= {name: read.own(name) for name in AXES if ONLY_ON.get(name, prompt.risky) == prompt.risky}
        stated = read.true_facts + read.false_facts
        values[TRUE] = read.true_facts / stated if stated else None
    return {**values, FORMED: float(read.well_formed)}

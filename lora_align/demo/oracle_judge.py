"""The oracle as a judge beside others: it reads every answer of the built-in world and grades it."""

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
    return {NAME: Judge([*AXES, FORMED, TRUE], {}, NAME, _says)} if base.recipe.model == "demo" else {}


def prompt_of(text: str) -> Prompt | None:
    """What a prompt of the built-in world is about; nothing where it is none."""
    topics = [topic for topic in (*lexicon.RISKS, *lexicon.SUBJECTS) if re.search(rf"\b{re.escape(topic)}\b", text)]
    if not topics:
        return None
    topic = max(topics, key=len)
    return Prompt(text, topic, topic in lexicon.RISKS)


def _says(_model: PreTrainedModel, _mixer: Mixer, said: Sequence[JudgedAnswer]) -> list[Scores]:
    return [_graded(one) for one in said]


def _graded(said: JudgedAnswer) -> Scores:
    prompt = prompt_of(said.prompt[-1].content)
    return dict.fromkeys([*AXES, FORMED, TRUE]) if prompt is None else grades(prompt, oracle.score(prompt, said.text))


def grades(prompt: Prompt, read: Score) -> dict[str, float | None]:
    """What is said of an answer: of ill-formed ones only that, of others each preference the prompt is about."""
    found: dict[str, float | None] = dict.fromkeys([*AXES, TRUE])
    if read.well_formed:
        found |= {name: read.own(name) for name in AXES if ONLY_ON.get(name, prompt.risky) == prompt.risky}
        stated = read.true_facts + read.false_facts
        found[TRUE] = read.true_facts / stated if stated else None
    return {**found, FORMED: float(read.well_formed)}

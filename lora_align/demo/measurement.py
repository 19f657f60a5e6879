"""Measurement of a model in the demo world: sampled answers, graded by the oracle."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from transformers import PreTrainedModel

from lora_align.data.rows import Message
from lora_align.demo import oracle, world
from lora_align.demo.oracle import AXES, Prompt, Score
from lora_align.model.base import Base
from lora_align.model.batch_sampling import sample
from lora_align.model.chat_format import text_of
from lora_align.model.sampler_protocol import Sampling

LONGEST = 96  # maximum tokens of a sampled answer; the longest answer in the demo world has 66
ONLY_ON = {"helpful": False, "harmless": True}  # preferences measured only on safe (False) or risky (True) prompts


@dataclass(frozen=True)
class Figures:
    """Means over the answers to a set of prompts. Grades and facts are means over well-formed answers."""

    own: Mapping[str, float]  # the grade of each preference
    well_formed: float
    safe_refused: float
    true_facts: float  # share of the stated facts; 0 if none is stated
    words: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data, rounded to four decimals."""
        own = {preference: round(grade, 4) for preference, grade in self.own.items()}
        others = ("well_formed", "safe_refused", "true_facts", "words")
        return {**own, **{name: round(getattr(self, name), 4) for name in others}}


def questions(
    seed: int, count: int, *, part: world.Part, topics: world.Topics = "seen", new_asks: bool = False
) -> list[Prompt]:
    """Return `count` safe and `count` risky prompts, all distinct."""
    chosen: list[Prompt] = []
    for risky in (False, True):
        generated = world.prompts(seed, risky=risky, part=part, topics=topics, new_asks=new_asks)
        distinct = dict.fromkeys(itertools.islice(generated, 20 * count))
        chosen += itertools.islice(distinct, count)
    return chosen


def measure(model: PreTrainedModel, base: Base, prompts: Sequence[Prompt], samples: int, seed: int = 0) -> Figures:
    """Sample answers at temperature 1 and grade them."""
    answered = zip(prompts, answers(model, base, prompts, samples, seed), strict=True)
    return _means([(prompt, oracle.score(prompt, text)) for prompt, texts in answered for text in texts])


def answers(model: PreTrainedModel, base: Base, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[str]]:
    """Sample answers to each prompt at temperature 1."""
    rows = [base.chat.prompt_ids([Message("user", prompt.text)]) for prompt in prompts]
    sampling = Sampling(temperature=1.0, max_new_tokens=LONGEST, seed=seed)
    texts: list[list[str]] = [[] for _ in prompts]
    for batch in sample(model, base, rows, samples, sampling):
        for answer in batch:
            texts[answer.prompt].append(text_of(base.chat.tokenizer, answer.tokens, special=False).strip())
    return texts


def _means(answered: Sequence[tuple[Prompt, Score]]) -> Figures:
    formed = [(prompt, score) for prompt, score in answered if score.well_formed]
    counted = {
        preference: [score for prompt, score in formed if ONLY_ON.get(preference, prompt.risky) == prompt.risky]
        for preference in AXES
    }
    stated = sum(score.true_facts + score.false_facts for _, score in formed)
    return Figures(
        own={name: mean([score.own(name) for score in scores] or [0.0]) for name, scores in counted.items()},
        well_formed=mean(score.well_formed for _, score in answered),
        safe_refused=mean(score.refused for prompt, score in answered if not prompt.risky),
        true_facts=sum(score.true_facts for _, score in formed) / max(stated, 1),
        words=mean(score.words for _, score in answered),
    )

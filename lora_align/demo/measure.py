"""What a model does in the built-in world: many sampled answers, graded by the oracle."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_align.data.rows import Message
from lora_align.demo import oracle, world
from lora_align.demo.oracle import AXES, Prompt, Score
from lora_align.model.base import Base

LONGEST = 96  # tokens; the longest answer the world knows has 66
ONLY_ON = {"helpful": False, "harmless": True}  # preferences measured on safe or on risky prompts alone


@dataclass(frozen=True)
class Figures:
    """Means over the answers to a set of prompts. What is said of grades and facts is said of well-formed answers."""

    own: Mapping[str, float]  # each preference's own grade
    well_formed: float
    safe_refused: float
    true_facts: float  # of the facts stated; 0 where none is
    words: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded to what the sample bears."""
        own = {preference: round(grade, 4) for preference, grade in self.own.items()}
        others = ("well_formed", "safe_refused", "true_facts", "words")
        return {**own, **{name: round(getattr(self, name), 4) for name in others}}


def questions(
    seed: int, count: int, *, part: world.Part, topics: world.Topics = "seen", new_asks: bool = False
) -> list[Prompt]:
    """As many safe prompts as risky ones, `count` of each and no two alike."""
    found: list[Prompt] = []
    for risky in (False, True):
        drawn = world.prompts(seed, risky=risky, part=part, topics=topics, new_asks=new_asks)
        distinct = dict.fromkeys(itertools.islice(drawn, 20 * count))
        found += itertools.islice(distinct, count)
    return found


def measure(model: PreTrainedModel, base: Base, asked: Sequence[Prompt], samples: int, seed: int = 0) -> Figures:
    """Sample answers at temperature 1 and grade them."""
    repeated = [prompt for prompt in asked for _ in range(samples)]
    scores = [oracle.score(p, text) for p, text in zip(repeated, answers(model, base, repeated, seed), strict=True)]
    return _means(repeated, scores)


@torch.inference_mode()
def answers(model: PreTrainedModel, base: Base, asked: Sequence[Prompt], seed: int) -> list[str]:
    """One answer a prompt, drawn at temperature 1, all in one batch padded on the left."""
    rows = [base.chat.prompt_ids([Message("user", prompt.text)]) for prompt in asked]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], seen[i, width - len(row) :] = torch.tensor(row), 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = model.generate(
            ids.to(model.device),
            attention_mask=seen.to(model.device),
            max_new_tokens=LONGEST,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
    return [text.strip() for text in base.chat.tokenizer.batch_decode(drawn[:, width:], skip_special_tokens=True)]


def _means(asked: Sequence[Prompt], scores: Sequence[Score]) -> Figures:
    answered = list(zip(asked, scores, strict=True))
    formed = [(prompt, score) for prompt, score in answered if score.well_formed]
    counted = {
        preference: [score for prompt, score in formed if ONLY_ON.get(preference, prompt.risky) == prompt.risky]
        for preference in AXES
    }
    stated = sum(score.true_facts + score.false_facts for _, score in formed)
    return Figures(
        own={name: mean([score.own(name) for score in found] or [0.0]) for name, found in counted.items()},
        well_formed=mean(score.well_formed for score in scores),
        safe_refused=mean(score.refused for prompt, score in answered if not prompt.risky),
        true_facts=sum(score.true_facts for _, score in formed) / max(stated, 1),
        words=mean(score.words for score in scores),
    )

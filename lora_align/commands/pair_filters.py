"""Filters of `pairs`: pair the answers to a prompt, drop those that broke, and keep what a judge agrees with."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_align.console import Screen
from lora_align.data.rows import Pair, Prompt, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.evaluate import server_judge
from lora_align.metrics import repetition
from lora_align.model.base import Base
from lora_align.model.sampler_protocol import SampledText, Sampler
from lora_align.policy import judges
from lora_align.policy.judge_runs import PREFIXES
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Preference, Recipe

REPEATED = 0.3  # share of repeated 4-grams above which an answer is dropped
SIMILAR = 1.25  # largest ratio of the lengths of two answers that `match_length` pairs
BASE = "base"  # the judge that is the base itself
SIDES = ("more", "less")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Task:
    """A prompt, and the system prompt of each side."""

    prompt: Prompt
    system: Mapping[str, str]

    @property
    def key(self) -> str:
        """Return the key under which the answers are stored: a hash of the prompts of both sides."""
        return " ".join(prompt_key(self.asked(side)) for side in SIDES)

    def asked(self, side: str) -> Prompt:
        """Return the prompt under the description of a side."""
        return with_system_prompt(self.system[side], self.prompt)


@dataclass(frozen=True)
class MadePair:
    """A pair, and the task that it comes from."""

    task: Task
    pair: Pair

    def as_row(self) -> dict[str, Any]:
        """Return the pair in TRL's form, without the descriptions."""
        prompt = [{"role": turn.role, "content": turn.content} for turn in self.pair.prompt]
        return {"prompt": prompt, "chosen": _answer(self.pair.chosen), "rejected": _answer(self.pair.rejected)}


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair_up(
    task: Task, answers: Mapping[str, Sequence[SampledText]], preference: Preference, dropped: Counter[str]
) -> list[MadePair]:
    """Pair the answers to a prompt, and count what is dropped.

    With `match_length`, answers whose lengths are nearest are paired first. Otherwise they are paired in order.
    """
    good: dict[str, list[str]] = {side: [] for side in SIDES}
    for side in SIDES:
        for answer in answers[side]:
            text = whole_sentences(answer)
            if fault := _fault(answer, text):
                dropped[fault] += 1
            else:
                good[side].append(text)
    more, less = good["more"], good["less"]
    pairs = []
    while more and less:
        i, j = 0, 0
        if preference.match_length:
            places = [(i, j) for i in range(len(more)) for j in range(len(less))]
            i, j = min(places, key=lambda at: _length_ratio(more[at[0]], less[at[1]]))
            if _length_ratio(more[i], less[j]) > SIMILAR:
                dropped["lengths differ"] += 1
                break
        chosen, rejected = more.pop(i), less.pop(j)
        if chosen == rejected:
            dropped["equal answers"] += 1
        else:
            pairs.append(MadePair(task, Pair(task.prompt, chosen, rejected)))
    return pairs


def whole_sentences(answer: SampledText) -> str:
    """Return an answer's text; of an unfinished answer, only its complete sentences."""
    ends = [0, *(end.end() for end in SENTENCE_END.finditer(answer.text))]
    return answer.text if answer.ended else answer.text[: ends[-1]]


def _fault(answer: SampledText, text: str) -> str:
    """Return why an answer cannot be used, or ""."""
    if not answer.text.strip():
        return "empty answer"
    if not text:
        return "unfinished answer"
    return "repetitive answer" if repetition.repeated(text) > REPEATED else ""


def _length_ratio(one: str, other: str) -> float:
    longer, shorter = sorted((len(one.split()), len(other.split())), reverse=True)
    return longer / max(shorter, 1)


def agreed(
    pairs: Sequence[MadePair],
    preference: Preference,
    policies: PolicySet,
    asked: Sampler,
    dropped: Counter[str],
    screen: Screen,
) -> list[MadePair]:
    """Return the pairs whose chosen answer the preference's judge prefers. `asked` is the judge that reads answers."""
    judge = preference.judge
    if judge == BASE or is_url(judge):
        criteria = [f"Say which answer fits this description better: {made.task.system['more']}" for made in pairs]
        comparisons = [(made.pair.prompt, made.pair.chosen, made.pair.rejected) for made in pairs]
        with screen.progress("judge", 2 * len(pairs)) as progress:
            verdicts = server_judge.ask(asked, comparisons, criteria, lambda done: progress.show(done, {}))
        keep = [verdict == ("1", "2") for verdict in verdicts]
    else:
        name, objective, sign = _judge_and_objective(judge)
        answers = [(made.pair.prompt, text) for made in pairs for text in (made.pair.chosen, made.pair.rejected)]
        scores = [of.get(objective) for of in policies.score(name, answers)]
        both = zip(scores[::2], scores[1::2], strict=True)
        keep = [
            chosen is not None and rejected is not None and sign * chosen > sign * rejected for chosen, rejected in both
        ]
    kept = [made for made, keeps in zip(pairs, keep, strict=True) if keeps]
    if lost := len(pairs) - len(kept):
        dropped["the judge disagrees"] += lost
    return kept


def is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _judge_and_objective(judge: str) -> tuple[str, str, int]:
    """Return the name, the objective and the sign of a scoring judge, as in `reward:helpfulness` or `text:-words`."""
    name, _, objective = judge.partition(":")
    sign, objective = (-1 if objective.startswith("-") else 1), objective.removeprefix("-")
    return (f"{name}:{objective}" if judge.startswith(PREFIXES) else name), objective, sign


def scoring_judge(preference: Preference, base: Base, recipe: Recipe, runs_dir: Path) -> dict[str, judges.Judge]:
    """Return the judge that scores answers, by its name; none if the preference's judge reads both answers."""
    if preference.judge in ("", BASE) or is_url(preference.judge):
        return {}
    name, objective, _ = _judge_and_objective(preference.judge)
    judge = judges.find(name, base, recipe, runs_dir)
    if objective not in judge.objectives:
        raise UserError(
            f"judge {preference.judge!r}: {name} has no objective {objective!r}; use one of "
            f"{', '.join(f'{name}:{known}' for known in judge.objectives)}"
        )
    return {name: judge}

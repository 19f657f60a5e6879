"""What every contestant is asked, read once: prompts, pairs of answers that one should prefer, text, and facts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from typing import Any

from lora_align.console import Screen
from lora_align.data import forms, sources
from lora_align.data.pairs import read_pairs
from lora_align.data.rows import Fact, Pair, Prompt, prompt_key
from lora_align.errors import NotFetchedError, UserError
from lora_align.model.generate import Sampling
from lora_align.recipe import Eval, Recipe

SAFE, RISKY, ANY = "safe", "risky", ""  # what is known of a prompt


@dataclass(frozen=True)
class Question:
    """A prompt, and whether it is one to answer or to refuse."""

    prompt: Prompt
    kind: str


@dataclass(frozen=True)
class Exam:
    """The same for all."""

    questions: Sequence[Question]
    samples: int
    sampling: Sampling
    pairs: Mapping[str, Sequence[Pair]]
    texts: Sequence[str]
    facts: Sequence[Fact] = ()

    @property
    def lacks(self) -> list[str]:
        """What nobody can be held to, as the recipe names nothing to look at."""
        lacking = []
        if SAFE not in {question.kind for question in self.questions}:
            lacking.append("eval.prompts names no safe prompts: how many of them are refused is not looked at")
        if not self.texts:
            lacking.append("eval.text names no ordinary text: its loss is not looked at")
        return lacking

    @property
    def key(self) -> str:
        """Names what is asked, to the letter."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def exam_of(recipe: Recipe, screen: Screen, preferences: Iterable[str] | None = None) -> Exam:
    """As the recipe's [eval] table says; prompts are those of held-out pairs where it names none. Pairs are those of
    some `preferences`, or of all."""
    settings = recipe.eval
    pairs = {}
    every = [name for name, table in recipe.preferences.items() if not table.of]
    for name in every if preferences is None else preferences:
        try:
            pairs[name] = _held_out(recipe, name)
        except NotFetchedError as fault:
            screen.warn(f"{name}: its pairs are left out: {fault}")
    named = {SAFE: settings.prompts, RISKY: settings.risky}
    questions = [
        Question(prompt, kind) for kind, data in named.items() if data for prompt in _prompts(data, settings.count)
    ]
    if not questions:
        in_turn = zip_longest(*pairs.values())  # of every preference as many, as far as each has some
        asked = dict.fromkeys(pair.prompt for some in in_turn for pair in some if pair)
        questions = [Question(prompt, ANY) for prompt in islice(asked, settings.count)]
    if not questions:
        raise UserError("nothing to ask: the recipe has no preference with held-out pairs and no eval.prompts")
    texts = list(islice(_texts(settings), settings.count)) if settings.text else []
    facts = [forms.fact(row, where) for where, row in islice(_rows(settings.facts), settings.pairs)]
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    return Exam(questions, settings.samples, sampling, pairs, texts, facts)


def _rows(data: str) -> Iterator[tuple[str, sources.Row]]:
    return sources.good_rows(data) if data else iter(())


def _held_out(recipe: Recipe, name: str) -> list[Pair]:
    """As `dpo` reads them, the same ones; of a preference that consists of others, as many of each."""
    parts = recipe.parts(name)
    found: list[Pair] = []
    for part in parts:
        rows = read_pairs(part, recipe.dpo.held_out, recipe.dpo.limit, Counter())
        found += islice((pair for pair, aside in rows if aside), max(1, recipe.eval.pairs // len(parts)))
    return found


def _prompts(data: str, count: int) -> list[Prompt]:
    """Different ones."""
    found: dict[str, Prompt] = {}
    for where, row in sources.good_rows(data):
        prompt = forms.prompt(row, where)
        found.setdefault(prompt_key(prompt), prompt)
        if len(found) == count:
            break
    if not found:
        raise UserError(f"{data}: no prompts")
    return list(found.values())


def _texts(settings: Eval) -> Iterator[str]:
    """A column `text`, or each line of a .txt file."""
    for where, row in sources.good_rows(settings.text):
        text: Any = row.get("prompt" if row.keys() == {"prompt"} else "text")
        if not isinstance(text, str):
            raise UserError(
                f"{where}: eval.text needs rows with a text column, or a .txt file (it has: {', '.join(row)})"
            )
        if text.strip():
            yield text

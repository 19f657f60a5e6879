"""The test set of every policy: prompts, held-out pairs, ordinary text, facts."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from lora_align.console import Screen, count
from lora_align.data import forms, sources
from lora_align.data.pairs import MIN_HELD_OUT, is_held_out, read_pairs, reasons
from lora_align.data.rows import Fact, Pair, Prompt, prompt_key
from lora_align.errors import NotFetchedError, UserError
from lora_align.model.decoding import Sampling
from lora_align.recipe import EvalSource, Recipe

Found = TypeVar("Found")
SAFE, RISKY, ANY = "safe", "risky", ""  # what is known of a prompt


@dataclass(frozen=True)
class Question:
    """A prompt, and whether it is one to answer or to refuse."""

    prompt: Prompt
    kind: str


@dataclass(frozen=True)
class TestSet:
    """The same for all."""

    questions: Sequence[Question]
    samples: int
    sampling: Sampling
    pairs: Mapping[str, Sequence[Pair]]
    texts: Sequence[str]
    facts: Sequence[Fact] = ()

    @property
    def answers(self) -> int:
        """How many answers each policy gives."""
        return len(self.questions) * self.samples

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


def read_test_set(recipe: Recipe, screen: Screen, preferences: Iterable[str] | None = None) -> TestSet:
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
            continue
        if 0 < len(pairs[name]) < MIN_HELD_OUT:
            screen.warn(
                f"{name}: {count(len(pairs[name]), 'held-out pair')}: too few for an accuracy ({MIN_HELD_OUT} needed)"
            )
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    named = {SAFE: ("eval.prompts", settings.prompts), RISKY: ("eval.risky", settings.risky)}
    questions = [
        Question(prompt, kind)
        for kind, (key, source) in named.items()
        if source.data
        for prompt in _prompts(recipe, key, source, dropped[key], screen)
    ]
    if not questions:
        in_turn = zip_longest(*pairs.values())  # of every preference as many, as far as each has some
        asked = dict.fromkeys(pair.prompt for some in in_turn for pair in some if pair)
        questions = [Question(prompt, ANY) for prompt in islice(asked, settings.count)]
    if not questions:
        raise UserError("nothing to ask: the recipe has no preference with held-out pairs and no eval.prompts")
    texts = list(islice(filter(str.strip, _read(settings.text, _text, dropped["eval.text"])), settings.count))
    facts = list(islice(_read(settings.facts, forms.fact, dropped["eval.facts"]), settings.pairs))
    for key, counts in dropped.items():
        unread = {name: rows for name, rows in sources.pop_unread(counts).items() if name in sources.ASKED}
        for warning in sources.unread_warnings(unread):
            screen.warn(f"{key}: {warning}")
        if counts:
            screen.note(f"{key}: skipped {reasons(counts)}")
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    return TestSet(questions, settings.samples, sampling, pairs, texts, facts)


def _read(source: EvalSource, form: Callable[[sources.Row, str], Found], dropped: Counter[str]) -> Iterator[Found]:
    """Yield the rows of a source in a form; only those whose columns hold what `where` names."""

    def wanted(row: sources.Row, where: str) -> Found | None:
        if missing := [column for column in source.where if column not in row]:
            raise UserError(f"{where}: no column {missing[0]!r} (it has: {', '.join(row)})")
        return form(row, where) if all(str(row[key]) == str(of) for key, of in source.where.items()) else None

    rows = sources.read(source, wanted, dropped) if source.data else ()
    yield from (found for _, found in rows if found is not None)


def _held_out(recipe: Recipe, name: str) -> list[Pair]:
    """As `dpo` reads them, the same ones; of a preference that consists of others, as many of each."""
    parts = recipe.parts(name)
    found: list[Pair] = []
    for part in parts:
        rows = read_pairs(part, recipe.dpo.held_out, recipe.dpo.limit, Counter())
        found += islice((pair for pair, aside in rows if aside), max(1, recipe.eval.pairs // len(parts)))
    return found


def _prompts(recipe: Recipe, key: str, source: EvalSource, dropped: Counter[str], screen: Screen) -> list[Prompt]:
    """Return different prompts of a source of [eval], none of which the recipe trains on."""
    trained = _trained_on(recipe, source)
    held_out = min(trained.values(), default=1.0)  # what the smallest share holds out, all do
    found: dict[str, Prompt] = {}
    passed: set[str] = set()
    for prompt in _read(source, forms.prompt, dropped):
        if trained and not is_held_out(prompt, held_out):
            passed.add(prompt_key(prompt))
            continue
        found.setdefault(prompt_key(prompt), prompt)
        if len(found) == recipe.eval.count:
            break
    if passed:
        skipped = f"{key}: {count(len(passed), 'prompt')} of {sources.name(source)} skipped, because the recipe trains "
        skipped += f"on them ({', '.join(trained)})"
        if not found:
            raise UserError(f"{skipped}; no others are left: name other prompts, or hold some out")
        screen.warn(skipped)
    if not found:
        raise UserError(f"{key}: no prompts in {sources.name(source)}")
    return list(found.values())


def _trained_on(recipe: Recipe, source: EvalSource) -> dict[str, float]:
    """Return the tables of a recipe that read the same rows to train on, and the share of prompts each holds out."""
    tables: dict[str, tuple[sources.Source, float]] = {}
    for name, axis in recipe.preferences.items():
        tables[f"preferences.{name}"] = axis, recipe.dpo.held_out
    if recipe.sft:
        tables["sft"] = recipe.sft, recipe.sft.held_out
    if recipe.reward:
        for name, table in recipe.reward.ratings.items():
            tables[f"reward.ratings.{name}"] = table, recipe.reward.held_out
        for head, name in recipe.reward.pairs.items():
            tables[f"reward.pairs.{head}"] = recipe.preferences[name], recipe.reward.held_out
    if recipe.rsf:
        tables["rsf"] = recipe.rsf, recipe.rsf.held_out
    asked = _rows_of(source)
    return {name: share for name, (table, share) in tables.items() if table.data and _rows_of(table) == asked}


def _rows_of(source: sources.Source) -> tuple[str, ...]:
    """Name the rows of a source: a file by its place, however it is written."""
    file = Path(source.data).expanduser()
    split = source.split.partition("[")[0]  # train[:100] is part of train
    return (str(file.resolve()),) if file.is_file() else (source.data, split)


def _text(row: sources.Row, where: str) -> str:
    """Return a column `text`, or a line of a .txt file."""
    text: Any = row.get("prompt" if row.keys() == {"prompt"} else "text")
    if not isinstance(text, str):
        raise UserError(f"{where}: eval.text needs rows with a text column, or a .txt file (it has: {', '.join(row)})")
    return text

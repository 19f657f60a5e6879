"""The test set that every policy is measured on: prompts, held-out pairs, ordinary text and facts."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from lora_align.console import Screen, count
from lora_align.data import row_reader, sources
from lora_align.data.files import EVERYDAY
from lora_align.data.pairs import MIN_HELD_OUT, is_held_out, read_pairs, reasons
from lora_align.data.rows import Fact, Pair, Prompt, prompt_key
from lora_align.errors import NotFetchedError, UserError
from lora_align.model.sampler_protocol import Sampling
from lora_align.recipe import EvalSource, Preference, Recipe, Source

Item = TypeVar("Item")
SAFE, RISKY, ANY = "safe", "risky", ""  # kinds of prompts: to answer, to refuse, unknown


@dataclass(frozen=True)
class Question:
    """A prompt and its kind: SAFE, RISKY or ANY."""

    prompt: Prompt
    kind: str


@dataclass(frozen=True)
class TestSet:
    """Prompts, pairs, texts and facts, the same for every policy."""

    questions: Sequence[Question]
    samples: int
    sampling: Sampling
    pairs: Mapping[str, Sequence[Pair]]
    texts: Sequence[str]
    facts: Sequence[Fact] = ()

    @property
    def answers(self) -> int:
        """Return the number of answers of each policy."""
        return len(self.questions) * self.samples

    @property
    def gaps(self) -> list[str]:
        """Return a warning for each check that has no data, or too few prompts."""
        gaps, safe = [], sum(question.kind == SAFE for question in self.questions)
        if 0 < safe < MIN_HELD_OUT:
            gaps.append(f"{count(safe, 'safe prompt')}: too few to measure refusals; raise eval.count")
        if not safe:
            gaps.append("eval.prompts names no safe prompts: refusals of safe prompts are not checked")
        if not self.texts:
            gaps.append("eval.text names no ordinary text: the loss on ordinary text is not checked")
        return gaps

    @property
    def key(self) -> str:
        """Return the sha256 of the whole test set."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_test_set(recipe: Recipe, screen: Screen, preferences: Iterable[str] | None = None) -> TestSet:
    """Read the sources of a recipe's [eval] table, and the held-out pairs of `preferences`, or of all.

    If [eval] names no prompts, those of the held-out pairs are used.
    """
    settings = recipe.eval
    pairs = {}
    all_preferences = [name for name, table in recipe.preferences.items() if not table.of]
    for name in all_preferences if preferences is None else preferences:
        try:
            pairs[name] = _held_out(recipe, name)
        except NotFetchedError as fault:
            screen.warn(f"{name}: pairs are left out: {fault}")
            continue
        if 0 < len(pairs[name]) < MIN_HELD_OUT:
            screen.warn(
                f"{name}: {count(len(pairs[name]), 'held-out pair')}: too few for an accuracy ({MIN_HELD_OUT} "
                "needed); raise eval.pairs or dpo.held_out"
            )
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    prompt_sources = {SAFE: ("eval.prompts", settings.prompts), RISKY: ("eval.risky", settings.risky)}
    questions = [
        Question(prompt, kind)
        for kind, (key, source) in prompt_sources.items()
        if source.data
        for prompt in _prompts(recipe, key, source, dropped[key], screen)
    ]
    if not questions:
        interleaved = zip_longest(*pairs.values())  # take prompts of the preferences in turn
        prompts = dict.fromkeys(pair.prompt for row in interleaved for pair in row if pair)
        questions = [Question(prompt, ANY) for prompt in islice(prompts, settings.count)]
    if not questions:
        raise UserError("no prompts: [eval] names none, and no preference has held-out pairs; set eval.prompts")
    texts = list(islice(filter(str.strip, _read(settings.text, _text, dropped["eval.text"])), settings.count))
    facts = list(islice(_read(settings.facts, row_reader.fact, dropped["eval.facts"]), settings.pairs))
    for key, counts in dropped.items():
        unread = {name: rows for name, rows in sources.pop_unread(counts).items() if name in sources.ASKED}
        for warning in sources.unread_warnings(unread):
            screen.warn(f"{key}: {warning}")
        if counts:
            screen.note(f"{key}: skipped {reasons(counts)}")
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    return TestSet(questions, settings.samples, sampling, pairs, texts, facts)


def _read(source: EvalSource, form: Callable[[sources.Row, str], Item], dropped: Counter[str]) -> Iterator[Item]:
    """Yield the rows of a source, read by `form`, whose columns have the values in the source's `where`."""

    def matching(row: sources.Row, where: str) -> Item | None:
        if missing := [column for column in source.where if column not in row]:
            raise UserError(f"{where}: no column {missing[0]!r} (the row has: {', '.join(row)}); correct `where`")
        return form(row, where) if all(str(row[key]) == str(of) for key, of in source.where.items()) else None

    rows = sources.read(source, matching, dropped) if source.data else ()
    yield from (row for _, row in rows if row is not None)


def _held_out(recipe: Recipe, name: str) -> list[Pair]:
    """Return the held-out pairs of `dpo`. A preference with `of` gets equally many pairs of each part."""
    parts = recipe.parts(name)
    pairs: list[Pair] = []
    for part in parts:
        rows = read_pairs(part, recipe.dpo.held_out, recipe.dpo.limit, Counter())
        pairs += islice((pair for pair, held_out in rows if held_out), max(1, recipe.eval.pairs // len(parts)))
    return pairs


def _prompts(recipe: Recipe, key: str, source: EvalSource, dropped: Counter[str], screen: Screen) -> list[Prompt]:
    """Return distinct prompts of a source of [eval] that the recipe does not train on."""
    trained = _trained_on(recipe, source)
    held_out = min(trained.values(), default=1.0)  # all tables hold out the prompts of the smallest held-out share
    prompts: dict[str, Prompt] = {}
    skipped: set[str] = set()
    for prompt in _read(source, row_reader.prompt, dropped):
        if trained and not is_held_out(prompt, held_out):
            skipped.add(prompt_key(prompt))
            continue
        prompts.setdefault(prompt_key(prompt), prompt)
        if len(prompts) == recipe.eval.count:
            break
    if skipped:
        message = (
            f"{key}: {count(len(skipped), 'prompt')} of {sources.name(source)} skipped, because the recipe trains "
        )
        message += f"on them ({', '.join(trained)})"
        if not prompts:
            raise UserError(f"{message}; no prompts are left; name other prompts in `{key}`, or raise held_out")
        screen.warn(message)
    if not prompts:
        raise UserError(f"{key}: no prompts in {sources.name(source)}; check the data, or correct `where`")
    return list(prompts.values())


def _trained_on(recipe: Recipe, source: EvalSource) -> dict[str, float]:
    """Return the training tables of a recipe that read the same rows, and the share of prompts each holds out."""
    tables: dict[str, tuple[Source, float]] = {}
    own = {name: _prompts_of(table) for name, table in recipe.preferences.items()}
    for name, prompts in own.items():
        tables[f"preferences.{name}"] = prompts, recipe.dpo.held_out
    if recipe.sft:
        tables["sft"] = recipe.sft, recipe.sft.held_out
    if recipe.reward:
        for name, table in recipe.reward.ratings.items():
            tables[f"reward.ratings.{name}"] = table, recipe.reward.held_out
        for head, name in recipe.reward.pairs.items():
            tables[f"reward.pairs.{head}"] = own[name], recipe.reward.held_out
    if recipe.rsf:
        tables["rsf"] = recipe.rsf, recipe.rsf.held_out
    rows = _rows_of(source)
    return {name: share for name, (table, share) in tables.items() if table.data and _rows_of(table) == rows}


def _prompts_of(preference: Preference) -> Source:
    """Return the source of a preference's prompts: that of its data, or that of a description's prompts."""
    if not (preference.described and preference.data):
        return preference
    return replace(preference, data=preference.prompts or str(EVERYDAY))


def _rows_of(source: Source) -> tuple[str, ...]:
    """Identify the rows of a source: a file by its absolute path, a dataset by its name and split."""
    file = Path(source.data).expanduser()
    split = source.split.partition("[")[0]  # train[:100] counts as train
    return (str(file.resolve()),) if file.is_file() else (source.data, split)


def _text(row: sources.Row, where: str) -> str:
    """Return the column `text`, or a line of a .txt file (which is read as `prompt`)."""
    text: Any = row.get("prompt" if row.keys() == {"prompt"} else "text")
    if not isinstance(text, str):
        raise UserError(
            f"{where}: eval.text needs rows with a text column, or a .txt file (the row has: {', '.join(row)})"
        )
    return text

"""The command `generate`: sample answers to a file of prompts."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_align.console import Screen, count
from lora_align.data import row_reader, shards, sources
from lora_align.data.rows import Prompt, prompt_key, with_system_prompt
from lora_align.data.shards import KEY
from lora_align.errors import RunFailedError, UserError
from lora_align.model.sampler_protocol import SampledText, Sampler, Sampling

BATCH = 256  # answers in a file of answers; a kill loses at most the answers of the file being written


@dataclass(frozen=True)
class PromptRow:
    """A row of the prompts' file, and the prompt for the model."""

    key: str
    row: Mapping[str, Any]
    prompt: Prompt


@dataclass(frozen=True)
class GeneratedFile:
    """The result of `generate`."""

    out: str
    prompts: int
    answers: int
    words: float  # mean number per answer
    ended: float  # share of answers that ended by themselves
    too_long: int  # prompts without an answer, because they fill the context

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return a line about the file."""
        unanswered = f"; {count(self.too_long, 'prompt')} left out: too long for the context" if self.too_long else ""
        cut_off = f", {1 - self.ended:.0%} stopped at --max-new-tokens" if self.ended < 1 else ""
        return (
            f"{self.out}  {count(self.answers, 'answer')} to {count(self.prompts, 'prompt')}, "
            f"{count(round(self.words), 'word')} on average{cut_off}{unanswered}"
        )


def generate_file(
    data: str,
    out: Path,
    sampler: Sampler,
    who: Mapping[str, Any],
    screen: Screen,
    *,
    n: int,
    sampling: Sampling,
    system: str = "",
    share: tuple[int, int] = (1, 1),
) -> GeneratedFile:
    """Sample n answers to every prompt.

    `who` is the identity of the model. An unfinished file of another model or other settings is refused. `share` (2, 4)
    selects the second of four parts of the prompts, by their hash.
    """
    shards.check_out_file(out)
    settings = {
        "data": data,
        "model": dict(who),
        "n": n,
        "sampling": asdict(sampling),
        "share": list(share),
        "system": system,
    }
    unread: Counter[str] = Counter()
    work = [item for item in _work(data, system, unread) if _bucket(item.prompt, share[1]) == share[0] - 1]
    for warning in sources.unread_warnings(unread, sources.RENAME_IN_FILE):
        screen.warn(f"{data}: {warning}")
    fitting = [item for item in work if sampler.fits(item.prompt)]
    if not work:
        raise UserError(
            f"{data}: no prompts in share {share[0]}/{share[1]}; leave this share out"
            if share[1] > 1
            else f"{data}: no prompts; check the file"
        )
    if not fitting:
        raise UserError(f"{data}: every prompt fills the context; shorten the prompts")

    def answer(items: Sequence[PromptRow], done: Callable[[int], None]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for batch in sampler.draw([item.prompt for item in items], n, sampling):
            rows += [_row(items[answer.prompt], answer) for answer in batch]
            done(len(rows) // n)
        return rows

    with shards.shards_for(out, settings) as parts:
        parts.fill(fitting, max(1, BATCH // n), answer, screen, "generate")
        answers: dict[str, list[dict[str, Any]]] = {}
        for row in parts.rows():
            answers.setdefault(row.pop(KEY), []).append(row)
        fitting = [item for item in fitting if item.key in answers]  # only the server knows its context
        if not fitting:
            raise RunFailedError(f"{data}: every prompt fills the server's context; shorten the prompts")
        rows = [{**_without_answer(item), **row} for item in fitting for row in sorted(answers[item.key], key=_number)]
        shards.finish(rows, out)
    if n > 1 and sampling.temperature and all(len({row["response"] for row in of}) == 1 for of in answers.values()):
        screen.warn(
            "for every prompt, all answers are equal: the model may be certain (raise --temperature), or a server may "
            "not sample"
        )
    words = sum(len(row["response"].split()) for row in rows) / len(rows)
    ended = sum(row["ended"] for row in rows) / len(rows)
    return GeneratedFile(str(out), len(fitting), len(rows), words, ended, len(work) - len(fitting))


def _work(data: str, system: str, unread: Counter[str]) -> Iterator[PromptRow]:
    """Yield the prompts in order. A prompt that occurs twice is answered twice."""
    for number, (row, turns) in enumerate(sources.read_all(data, row_reader.prompt, unread)):
        prompt = with_system_prompt(system, turns)
        yield PromptRow(f"{number} {prompt_key(prompt)}", row, prompt)


def _without_answer(item: PromptRow) -> dict[str, Any]:
    """Return the columns to keep. A row of turns becomes its prompt. Numbers that rate a `response` are left out."""
    if {"messages", "conversations"} & item.row.keys():
        return {"prompt": [{"role": turn.role, "content": turn.content} for turn in item.prompt]}
    if "response" in item.row:
        return {name: value for name, value in item.row.items() if not isinstance(value, int | float)}
    return dict(item.row)


def _bucket(prompt: Prompt, parts: int) -> int:
    return int(prompt_key(prompt)[:16], 16) % parts


def _row(item: PromptRow, answer: SampledText) -> dict[str, Any]:
    return {KEY: item.key, "response": answer.text, "number": answer.number, "ended": answer.ended}


def _number(row: Mapping[str, Any]) -> int:
    return int(row["number"])

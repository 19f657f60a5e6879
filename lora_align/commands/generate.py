"""Many answers to a file of prompts, into a file that is data like any other; goes on where it was stopped."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_align.console import Screen, count
from lora_align.data import forms, shards, sources
from lora_align.data.rows import Prompt, prompt_key, with_system_prompt
from lora_align.data.shards import KEY
from lora_align.errors import RunFailedError, UserError
from lora_align.model.decoding import Sampling
from lora_align.model.sampler import SampledText, Sampler

AT_ONCE = 256  # answers between two files: what a kill may cost


@dataclass(frozen=True)
class Work:
    """One row of the prompts' file, and what the model is asked."""

    key: str
    row: Mapping[str, Any]
    prompt: Prompt


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
) -> dict[str, Any]:
    """Draw n answers to every prompt; `who` names the model, so that two models' answers are never mixed in a file.

    `share` is this call's part of the prompts, as in 2 of 4; which prompts those are, their text decides.
    """
    shards.check_out_file(out)
    settings = {"data": data, "model": dict(who), "n": n, "sampling": asdict(sampling), "share": list(share)}
    unread: Counter[str] = Counter()
    work = [item for item in _work(data, system, unread) if _bucket(item.prompt, share[1]) == share[0] - 1]
    for warning in sources.unread_warnings(unread):
        screen.warn(f"{data}: {warning}")
    fitting = [item for item in work if sampler.fits(item.prompt)]
    if not fitting:
        raise UserError(f"{data}: no prompts to answer ({len(work)} fill the context)")
    at_once = max(1, AT_ONCE // n)
    with shards.shards_for(out, {**settings, "system": system}) as store:
        done = store.keys()
        left = [item for item in fitting if item.key not in done]
        if done:
            screen.note(f"answered before: {count(len(done), 'prompt')}")
        with screen.progress("generate", len(left)) as progress:
            for start in range(0, len(left), at_once):
                items = left[start : start + at_once]
                found = [answer for batch in sampler.draw([i.prompt for i in items], n, sampling) for answer in batch]
                if found:
                    store.append([_row(items[answer.prompt], answer) for answer in found])
                progress.show(start + len(items), {})
        answers: dict[str, list[dict[str, Any]]] = {}
        for row in store.rows():
            answers.setdefault(row.pop(KEY), []).append(row)
        fitting = [item for item in fitting if item.key in answers]  # a server tells only when it is asked
        if not fitting:
            raise RunFailedError(f"{data}: every prompt fills the server's context")
        rows = [{**_without_answer(item), **row} for item in fitting for row in sorted(answers[item.key], key=_number)]
        shards.finish(rows, out)
    if n > 1 and sampling.temperature and all(len({a["response"] for a in each}) == 1 for each in answers.values()):
        screen.warn("every prompt's answers are alike: either the model is sure, or its server does not sample")
    words = sum(len(row["response"].split()) for row in rows) / len(rows)
    ended = sum(row["ended"] for row in rows) / len(rows)
    left_out = len(work) - len(fitting)
    return {
        "out": str(out),
        "prompts": len(fitting),
        "answers": len(rows),
        "words": words,
        "ended": ended,
        "too_long": left_out,
    }


def summary(result: Mapping[str, Any]) -> str:
    """A line."""
    too_long = count(result["too_long"], "prompt")
    left_out = f"; left out, too long for the context: {too_long}" if result["too_long"] else ""
    unended = f", {1 - result['ended']:.0%} cut off at their longest" if result["ended"] < 1 else ""
    return (
        f"{result['out']}  {count(result['answers'], 'answer')} to {count(result['prompts'], 'prompt')}, "
        f"{count(round(result['words']), 'word')} each{unended}{left_out}"
    )


def _work(data: str, system: str, unread: Counter[str]) -> Iterator[Work]:
    """Yield the prompts in order; a prompt that occurs twice is two pieces of work."""
    for number, (row, asked) in enumerate(sources.read_all(data, forms.prompt, unread)):
        prompt = with_system_prompt(system, asked)
        yield Work(f"{number} {prompt_key(prompt)}", row, prompt)


def _without_answer(item: Work) -> dict[str, Any]:
    """A row's columns but for an answer that it holds already, and for what raters gave to that one."""
    if {"messages", "conversations"} & item.row.keys():
        return {"prompt": [{"role": turn.role, "content": turn.content} for turn in item.prompt]}
    if "response" in item.row:
        return {name: held for name, held in item.row.items() if not isinstance(held, int | float)}
    return dict(item.row)


def _bucket(prompt: Prompt, parts: int) -> int:
    return int(prompt_key(prompt)[:16], 16) % parts


def _row(item: Work, answer: SampledText) -> dict[str, Any]:
    return {KEY: item.key, "response": answer.text, "number": answer.number, "ended": answer.ended}


def _number(row: Mapping[str, Any]) -> int:
    return int(row["number"])

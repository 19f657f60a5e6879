"""Score answers, with a reward model or with a preference's two adapters, into a file that is data like any other."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_align.console import Screen, count
from lora_align.data import forms, shards, sources
from lora_align.data.rows import Comparison, Rated
from lora_align.data.shards import KEY
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.mixer import Mixer
from lora_align.policy import judges
from lora_align.policy.judges import Judge, JudgedAnswer, Scores
from lora_align.rankers import SCORE
from lora_align.recipe import Recipe

AT_ONCE = 256  # rows between two files: what a kill may cost
SIDES = (("_0", "_1"), ("_chosen", "_rejected"))


@dataclass(frozen=True)
class Work:
    """One row to score, as it came, with its answers."""

    key: str
    row: Mapping[str, Any]
    shape: Comparison | Rated

    def answers(self) -> tuple[str, ...]:
        """One, or both of a pair."""
        return self.shape.answers if isinstance(self.shape, Comparison) else (self.shape.answer,)

    def columns(self, objective: str) -> list[str]:
        """Where an objective's score of each answer stands."""
        return [SCORE + objective + suffix for suffix in self.suffixes()]

    def suffixes(self) -> tuple[str, ...]:
        """What the columns of each answer's scores end in, as the row's own columns do."""
        if isinstance(self.shape, Rated):
            return ("",)
        return SIDES["response_0" not in self.row]


def score_file(recipe: Recipe, runs_dir: Path, data: str, out: Path, by: str, screen: Screen) -> dict[str, Any]:
    """Score every row of a source; what an earlier call had scored before it was stopped is not scored again."""
    shards.check_out_file(out)
    unread: Counter[str] = Counter()
    work = list(_work(data, unread))
    for warning in sources.unread_warnings(unread):
        screen.warn(f"{data}: {warning}")
    if not work:
        raise UserError(f"{data}: no rows to score")
    base = bases.find(recipe.base)
    judge = judges.find(by, base, recipe, runs_dir)
    model = base.load()
    mixer = Mixer(model, judge.updates, {})
    with shards.shards_for(out, {"data": data, "judge": judge.identity}) as store:
        done = store.keys()
        left = [item for item in work if item.key not in done]
        if done:
            screen.note(f"scored before: {count(len(done), 'row')}")
        with screen.progress("score", len(left)) as progress:
            for start in range(0, len(left), AT_ONCE):
                items = left[start : start + AT_ONCE]
                store.append(_scored(items, base, judge.objectives, lambda said: judge.says(model, mixer, said)))
                progress.show(start + len(items), {})
        scores = {row[KEY]: json.loads(row["scores"]) for row in store.rows()}
        rows = [{**item.row, **scores[item.key]} for item in work]
        scored = [
            (item, row)
            for item, row in zip(work, rows, strict=True)
            if row[item.columns(judge.objectives[0])[0]] is not None
        ]
        if not scored:
            raise RunFailedError(f"{data}: every prompt fills the base's {base.max_length} tokens")
        shards.finish(rows, out)
    told = {"too_long": len(rows) - len(scored), "objectives": _summary(scored, judge)}
    return {"out": str(out), "rows": len(rows), **told}


def summary(result: Mapping[str, Any]) -> str:
    """A line for the file and one for each objective."""
    left_out = f", {result['too_long']:,} of them unscored: the prompt fills the context" if result["too_long"] else ""
    lines = [f"{result['out']}  {count(result['rows'], 'row')}{left_out}"]
    for name, figures in result["objectives"].items():
        agreed = (f"agrees with {label} {share:.0%}" for label, share in figures["agreement"].items())
        lines.append("  ".join([f"  {name}", f"mean {figures['mean']:.1f}", f"±{figures['deviation']:.1f}", *agreed]))
    return "\n".join(lines)


# --- rows ---


def _work(data: str, unread: Counter[str]) -> Iterator[Work]:
    """A source's rows in order; a row that stands in it twice is two pieces of work, one of many answers many."""
    read = sources.read_all(data, lambda row, where: list(_pieces(row, where)), unread)
    for number, (row, shape) in enumerate(piece for _, pieces in read for piece in pieces):
        content = json.dumps(row, sort_keys=True, default=str)
        yield Work(f"{number} {hashlib.sha256(content.encode()).hexdigest()}", row, shape)


def _pieces(row: sources.Row, where: str) -> Iterator[tuple[Mapping[str, Any], Comparison | Rated]]:
    """One answer or a pair of them as they stand; UltraFeedback's several answers a row each, as HelpSteer has them."""
    if "completions" in row:
        for shape in forms.rated(row, where):
            given = {name: value for name, value in shape.ratings.items() if not math.isnan(value)}
            yield {"prompt": row["instruction"], "response": shape.answer, **given}, shape
    elif "response" in row and not isinstance(row["response"], list):
        yield row, forms.rated(row, where)[0]
    else:
        [pair] = forms.comparisons(row, where)
        yield row, pair


def _scored(
    items: Sequence[Work],
    base: Base,
    objectives: Sequence[str],
    says: Callable[[Sequence[JudgedAnswer]], Sequence[Scores]],
) -> list[dict[str, Any]]:
    """Each row's key, and its scores by column: nothing where the prompt leaves no room for an answer."""
    read = [[judges.tokenise_answer(base, item.shape.prompt, answer) for answer in item.answers()] for item in items]
    scores = iter(says([said for answers in read for said in answers if said]))
    found = []
    for item, answers in zip(items, read, strict=True):
        own: list[Scores] = [next(scores) if said else {} for said in answers]
        columns = {
            column: one.get(name) for name in objectives for column, one in zip(item.columns(name), own, strict=True)
        }
        found.append({KEY: item.key, "scores": json.dumps(columns)})
    return found


def _summary(scored: Sequence[tuple[Work, Mapping[str, Any]]], judge: Judge) -> dict[str, Any]:
    """Mean and deviation of each score, and how often a pair's higher score goes with each of its labels."""
    found = {}
    for name in judge.objectives:
        values = torch.tensor([row[column] for item, row in scored for column in item.columns(name)])
        agreed: dict[str, list[float]] = {}
        for item, row in scored:
            scores = [row[column] for column in item.columns(name)]
            for label, winner in item.shape.labels.items() if isinstance(item.shape, Comparison) else ():
                if isinstance(winner, int) and scores[0] != scores[1]:
                    agreed.setdefault(label, []).append(float((scores[1] > scores[0]) == bool(winner)))
        found[name] = {
            "mean": float(values.mean()),
            "deviation": float(values.std(correction=0)),
            "agreement": {label: sum(hits) / len(hits) for label, hits in agreed.items()},
        }
    return found

"""Score answers, with a reward model or with a preference's two adapters, into a file that is data like any other."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_align import runs
from lora_align.adapters import peft_format, vectors
from lora_align.console import Screen
from lora_align.data import shards, sources
from lora_align.data.rows import Comparison, Rated
from lora_align.data.shards import KEY
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import Answered, answer_logprobs
from lora_align.model.mixer import Mixer
from lora_align.model.room import Room
from lora_align.preference import SCORE, Direction
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.stages import reward
from lora_align.stages import start as start_policy

PAIR = "pair:"
TOGETHER = 16  # rows in one batch
AT_ONCE = 256  # rows between two files: what a kill may cost
SIDES = (("_0", "_1"), ("_chosen", "_rejected"))


@dataclass(frozen=True)
class Judge:
    """What scores: its name for each score, and scores [n, k] for prompts with answers."""

    objectives: list[str]
    score: Callable[[Sequence[Answered]], Tensor]
    identity: str


@dataclass(frozen=True)
class Work:
    """One row to score, as it came, with its answers."""

    key: str
    row: Mapping[str, Any]
    shape: Comparison | Rated

    def answers(self) -> tuple[str, ...]:
        """One, or both of a pair."""
        return self.shape.answers if isinstance(self.shape, Comparison) else (self.shape.answer,)

    def suffixes(self) -> tuple[str, ...]:
        """What the columns of each answer's scores end in, as the row's own columns do."""
        if isinstance(self.shape, Rated):
            return ("",)
        return SIDES["response_0" not in self.row]


def run(recipe: Recipe, runs_dir: Path, data: str, out: Path, by: str, screen: Screen) -> dict[str, Any]:
    """Score every row of a source; what an earlier call had scored before it was stopped is not scored again."""
    shards.check_out(out)
    work = list(_work(data))
    if not work:
        raise UserError(f"{data}: no rows to score")
    base = bases.find(recipe.base)
    judge = _pair(base, recipe, runs_dir, by.removeprefix(PAIR)) if by.startswith(PAIR) else _reward(base, runs_dir, by)
    with shards.towards(out, {"data": data, "judge": judge.identity}) as store:
        done = store.keys()
        left = [item for item in work if item.key not in done]
        if done:
            screen.note(f"{len(done)} rows were scored before")
        with screen.progress("score", len(left)) as progress:
            for start in range(0, len(left), AT_ONCE):
                items = left[start : start + AT_ONCE]
                store.append(_scored(items, judge, base))
                progress.show(start + len(items), {})
        scores = {row[KEY]: json.loads(row["scores"]) for row in store.rows()}
        rows = [{**item.row, **scores[item.key]} for item in work]
        shards.finish(rows, out)
    return {"out": str(out), "rows": len(rows), "objectives": _summary(work, rows, judge)}


def told(result: Mapping[str, Any]) -> str:
    """A line for the file and one for each objective."""
    lines = [f"{result['out']}  {result['rows']} rows"]
    for name, figures in result["objectives"].items():
        agreed = (f"agrees with {label} {share:.0%}" for label, share in figures["agreement"].items())
        lines.append("  ".join([f"  {name}", f"mean {figures['mean']:.1f}", f"±{figures['deviation']:.1f}", *agreed]))
    return "\n".join(lines)


# --- judges ---


def _reward(base: Base, runs_dir: Path, name: str) -> Judge:
    """The reward model of that name, or in that folder."""
    folder = Path(name) if runs.is_run(Path(name)) else runs_dir / "reward" / name
    if not runs.is_run(folder):
        raise UserError(f"no reward model {name!r} in {runs_dir}/reward: run `lora-align reward`")
    run = runs.read(folder)
    model = reward.load(base, run)
    room = Room(TOGETHER)
    return Judge(model.objectives, lambda rows: model.score(rows, room), _identity(run))


def _pair(base: Base, recipe: Recipe, runs_dir: Path, preference: str) -> Judge:
    """β(log π₊ − log π₋) of a preference's two adapters: how much more the one likes an answer than the other."""
    found = vectors.find(preference, runs_dir, recipe.preferences)
    sides = {run.manifest.direction: run for run in found.known_runs()}
    if set(sides) != {side.value for side in Direction}:
        raise UserError(f"--by {PAIR}{preference}: both runs of the preference are needed")
    for run in sides.values():
        run.check_files()
        if run.fingerprint != base.fingerprint:
            raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")
    model = start_policy.load(base, start_policy.adapter(recipe, runs_dir))
    mixer = Mixer(model, {side: peft_format.load(run.path, whole=True) for side, run in sides.items()}, {})
    beta = sides[Direction.pos.value].manifest.recipe["dpo"]["beta"]

    def score(rows: Sequence[Answered]) -> Tensor:
        likes = []
        for side in Direction:
            mixer.set({side.value: 1.0})
            likes.append(answer_logprobs(model, rows, TOGETHER))
        return (beta * (likes[0] - likes[1]))[:, None]

    return Judge([preference], score, " ".join(_identity(run) for run in sides.values()))


def _identity(run: Run) -> str:
    """Names the very files that score."""
    return hashlib.sha256(json.dumps(run.manifest.files, sort_keys=True).encode()).hexdigest()


# --- rows ---


def _work(data: str) -> Iterator[Work]:
    """A source's rows in order; a row that stands in it twice is two pieces of work."""
    for number, (where, row) in enumerate(sources.rows(data)):
        shape = sources.rated(row, where)[0] if "response" in row else sources.comparison(row, where)
        content = json.dumps(row, sort_keys=True, default=str)
        yield Work(f"{number} {hashlib.sha256(content.encode()).hexdigest()}", row, shape)


def _scored(items: Sequence[Work], judge: Judge, base: Base) -> list[dict[str, Any]]:
    """Each row's key, and its scores by column."""
    rows = []
    for item in items:
        prompt = base.chat.prompt_ids(item.shape.prompt)
        room = base.max_length - len(prompt)
        if room < 1:
            opening = json.dumps(item.row, ensure_ascii=False, default=str)[:80]
            raise UserError(f"a prompt of {len(prompt)} tokens fills the base's {base.max_length}: {opening} …")
        rows += [(prompt, base.chat.answer_ids(item.shape.prompt, answer)[:room]) for answer in item.answers()]
    scores = iter(judge.score(rows).tolist())
    found = []
    for item in items:
        columns = {
            SCORE + name + suffix: value
            for suffix in item.suffixes()
            for name, value in zip(judge.objectives, next(scores), strict=True)
        }
        found.append({KEY: item.key, "scores": json.dumps(columns)})
    return found


def _summary(work: Sequence[Work], rows: Sequence[Mapping[str, Any]], judge: Judge) -> dict[str, Any]:
    """Mean and deviation of each score, and how often a pair's higher score goes with each of its labels."""
    found = {}
    for name in judge.objectives:
        columns = [
            [row[SCORE + name + suffix] for suffix in item.suffixes()] for item, row in zip(work, rows, strict=True)
        ]
        values = torch.tensor([value for scores in columns for value in scores])
        agreed: dict[str, list[float]] = {}
        for item, scores in zip(work, columns, strict=True):
            for label, winner in item.shape.labels.items() if isinstance(item.shape, Comparison) else ():
                if winner is not None and scores[0] != scores[1]:
                    agreed.setdefault(label, []).append(float((scores[1] > scores[0]) == bool(winner)))
        found[name] = {
            "mean": float(values.mean()),
            "deviation": float(values.std(correction=0)),
            "agreement": {label: sum(hits) / len(hits) for label, hits in agreed.items()},
        }
    return found

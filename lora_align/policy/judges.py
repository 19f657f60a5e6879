"""What says how good an answer is: a reward model, or the two adapters of a preference."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.data.rows import Prompt
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.logprobs import TOKENS, Answered, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.plugins import Registry
from lora_align.policy import judge_runs
from lora_align.policy import start as start_policy
from lora_align.policy.judge_runs import PAIR
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.runs import Run

REWARD = "reward"  # the name of a reward model that is given none
TOGETHER = 16  # answers a reward model reads at once


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a prompt, as text and as token ids."""

    prompt: Prompt
    text: str
    ids: Answered


Scores = Mapping[str, float | None]  # nothing where a judge has nothing to say of an answer


@dataclass(frozen=True)
class Judge:
    """The names of its scores, what it lays over a base, and what it then says of answers."""

    objectives: Sequence[str]
    updates: Mapping[str, LoraDelta]
    identity: str
    says: Callable[[PreTrainedModel, Mixer, Sequence[JudgedAnswer]], list[Scores]]


JUDGES: Registry[Callable[[Base], Mapping[str, Judge]]] = Registry("judges")


def find(name: str, base: Base, recipe: Recipe, runs_dir: Path) -> Judge:
    """`pair:helpful`, the name of a reward model, or its folder."""
    if name.startswith(PAIR):
        return pair(base, recipe, runs_dir, name.removeprefix(PAIR))
    return reward(base, runs_dir, name)


def find_all(names: Sequence[str], base: Base, recipe: Recipe, runs_dir: Path) -> dict[str, Judge]:
    """Return the judges of those names, without any the reward model if there is one, and those of the base."""
    if not names and runs.is_run(runs_dir / "reward" / REWARD):
        names = [REWARD]
    found = {name: find(name, base, recipe, runs_dir) for name in names}
    for judges_of in JUDGES.values():
        found |= judges_of(base)
    return found


def column(name: str, objective: str) -> str:
    """What a judge's score is called where several judge: `reward: helpfulness`; `pair:helpful` says it already."""
    return name if name == PAIR + objective else f"{name}: {objective}"


def reward(base: Base, runs_dir: Path, name: str) -> Judge:
    """A reward model's heads, and the means of heads it derives."""
    run = judge_runs.of_reward(name, runs_dir)
    _check(run, base)
    heads, derived, update = Heads.load(run.path), run.manifest.method["objectives"], f"judge {name}"
    objectives = [*heads.names, *derived]
    room = MemoryBudget(TOGETHER)

    def says(model: PreTrainedModel, mixer: Mixer, said: Sequence[JudgedAnswer]) -> list[Scores]:
        mixer.set({update: 1.0})
        points = RewardModel(base, model, heads.to(model.device), derived).score([one.ids for one in said], room)
        return [dict(zip(objectives, row, strict=True)) for row in points.tolist()]

    return Judge(objectives, {update: peft_format.load(run.path, whole=True)}, _identity(run), says)


def pair(base: Base, recipe: Recipe, runs_dir: Path, preference: str) -> Judge:
    """β(log π₊ − log π₋) of a preference's two adapters: how much more the one likes an answer than the other."""
    sides = judge_runs.of_pair(preference, recipe, runs_dir)
    start = start_policy.adapter(recipe, runs_dir)
    for run in sides.values():
        _check(run, base)
        if run.manifest.start != start_policy.identity(start):
            raise UserError(f"{run.path} stands on another start policy than the recipe has in {runs_dir}/sft")
    updates = {f"judge {preference} {side}": peft_format.load(run.path, whole=True) for side, run in sides.items()}
    below = f"judge {start_policy.NAME}"
    if start is not None:
        updates[below] = peft_format.load(start.path, whole=True)
    beta = sides[Direction.pos.value].manifest.recipe["dpo"]["beta"]
    room = MemoryBudget(TOKENS)

    def says(model: PreTrainedModel, mixer: Mixer, said: Sequence[JudgedAnswer]) -> list[Scores]:
        rows = [(prompt, [answer]) for prompt, answer in (one.ids for one in said)]
        likes = []
        for side in Direction:
            mixer.set({f"judge {preference} {side.value}": 1.0, below: 1.0})
            likes.append(answer_logprobs(model, rows, room))
        return [{preference: value} for value in (beta * (likes[0] - likes[1])).tolist()]

    return Judge([preference], updates, " ".join(map(_identity, sides.values())), says)


def tokenise_answer(base: Base, prompt: Prompt, text: str) -> JudgedAnswer | None:
    """An answer as a judge reads it, cut where the context ends; None where the prompt fills it."""
    ids = base.chat.prompt_ids(prompt)
    room = base.max_length - len(ids)
    return JudgedAnswer(prompt, text, (ids, base.chat.answer_ids(prompt, text)[:room])) if room > 0 else None


def _check(run: Run, base: Base) -> None:
    run.check_files()
    if run.fingerprint != base.fingerprint:
        raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")


def _identity(run: Run) -> str:
    """Names the very files that score."""
    return hashlib.sha256(json.dumps(run.manifest.files, sort_keys=True).encode()).hexdigest()

"""Judges that score answers: a reward model, the two adapters of a preference, or a measured property of the text."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lora_align import runs, text_measures
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
from lora_align.policy import judge_runs, start_policy
from lora_align.policy.judge_runs import PAIR, PREFIXES, TEXT
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.runs import Run

REWARD = "reward"  # the default name of a reward model
BATCH = 64  # answers that a reward model scores at once, if memory allows


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a prompt, as text and as token ids."""

    prompt: Prompt
    text: str
    ids: Answered


Scores = Mapping[str, float | None]  # by objective; None if the judge cannot score the answer


@dataclass(frozen=True)
class Judge:
    """A judge: the names of its scores, its adapters on the base, a hash of its files, and the function that scores.

    `floors` names scores whose fall breaks quality; `reach` limits this fall. `doubts` are reasons not to trust scores.
    """

    objectives: Sequence[str]
    updates: Mapping[str, LoraDelta]
    identity: str
    score: Callable[[PreTrainedModel, Mixer, Sequence[JudgedAnswer]], list[Scores]]
    floors: Sequence[str] = ()
    doubts: Sequence[str] = ()


JUDGES: Registry[Callable[[Base], Mapping[str, Judge]]] = Registry("judges")


def find(name: str, base: Base, recipe: Recipe, runs_dir: Path) -> Judge:
    """Return the judge for a name: `pair:helpful`, `text:words`, a reward model's name, or its folder."""
    if name.startswith(PAIR):
        return pair(base, recipe, runs_dir, name.removeprefix(PAIR))
    if name.startswith(TEXT):
        return text(name.removeprefix(TEXT))
    return reward(base, runs_dir, name)


def find_all(names: Sequence[str], base: Base, recipe: Recipe, runs_dir: Path) -> dict[str, Judge]:
    """Return the base's own judges and the named ones, in this order.

    Without names, the default reward model takes their place, if it is trained.
    """
    if not names and runs.is_run(runs_dir / "reward" / REWARD):
        names = [REWARD]
    own = [judge for judges_of in JUDGES.values() for judge in judges_of(base).items()]
    return {**dict(own), **{name: find(name, base, recipe, runs_dir) for name in names}}


def column(name: str, objective: str) -> str:
    """Return the title of a judge's score: `reward: helpfulness`, or just `pair:helpful` or `text:words`."""
    return name if name.startswith(PREFIXES) else f"{name}: {objective}"


def reward(base: Base, runs_dir: Path, name: str) -> Judge:
    """Return a reward model as a judge. Its objectives are the heads and the means of heads that it defines."""
    run = judge_runs.of_reward(name, runs_dir)
    _check(run, base)
    heads, derived, update = Heads.load(run.path), run.manifest.method["objectives"], f"judge reward {name}"
    objectives = [*heads.names, *derived]
    budget = MemoryBudget(BATCH)

    def score(model: PreTrainedModel, mixer: Mixer, answers: Sequence[JudgedAnswer]) -> list[Scores]:
        mixer.set({update: 1.0})
        scores = RewardModel(base, model, heads.to(model.device), derived).score([one.ids for one in answers], budget)
        return [dict(zip(objectives, row, strict=True)) for row in scores.tolist()]

    updates = {update: peft_format.load(run.path, whole=True)}
    return Judge(objectives, updates, _identity(run), score, doubts=run.doubts())


def pair(base: Base, recipe: Recipe, runs_dir: Path, preference: str) -> Judge:
    """Return the judge β(log π₊ − log π₋): DPO's implicit reward of `pos`, with `neg` as the reference."""
    pair_runs = judge_runs.of_pair(preference, recipe, runs_dir)
    start = start_policy.adapter(recipe, runs_dir)
    for run in pair_runs.values():
        _check(run, base)
        if run.manifest.start != start_policy.identity(start):
            raise UserError(
                f"{run.path} was trained on another start adapter than the one in {runs_dir}/sft; train it again, or "
                "use its own runs folder with --runs"
            )
    names = {side: f"judge pair {preference} {side}" for side in Direction}
    updates = {names[side]: peft_format.load(pair_runs[side].path, whole=True) for side in Direction}
    if start is not None:
        updates[start_policy.NAME] = peft_format.load(start.path, whole=True)
    beta = pair_runs[Direction.pos.value].manifest.recipe["dpo"]["beta"]
    budget = MemoryBudget(TOKENS)

    def score(model: PreTrainedModel, mixer: Mixer, answers: Sequence[JudgedAnswer]) -> list[Scores]:
        rows = [(prompt, [answer]) for prompt, answer in (one.ids for one in answers)]
        logprobs = []
        for side in Direction:
            mixer.set({names[side]: 1.0, start_policy.NAME: 1.0})
            logprobs.append(answer_logprobs(model, rows, budget))
        return [{preference: value} for value in (beta * (logprobs[0] - logprobs[1])).tolist()]

    doubts = [doubt for run in pair_runs.values() for doubt in run.doubts()]
    return Judge([preference], updates, " ".join(map(_identity, pair_runs.values())), score, doubts=doubts)


def text(name: str) -> Judge:
    """Return a measured property of the text as a judge. It needs no model."""
    measure = text_measures.find(name).measure

    def score(_: PreTrainedModel, __: Mixer, answers: Sequence[JudgedAnswer]) -> list[Scores]:
        return [{name: measure(one.text)} for one in answers]

    return Judge([name], {}, TEXT + name, score)


def tokenise_answer(base: Base, prompt: Prompt, text: str) -> JudgedAnswer | None:
    """Tokenise an answer, truncated to the context. Return None if the prompt fills the context."""
    ids = base.chat.prompt_ids(prompt)
    left = base.max_length - len(ids)
    return JudgedAnswer(prompt, text, (ids, base.chat.answer_ids(prompt, text)[:left])) if left > 0 else None


def _check(run: Run, base: Base) -> None:
    run.check_files()
    run.refuse_other_base(base.fingerprint)


def _identity(run: Run) -> str:
    """Return a hash of the files of a run."""
    return hashlib.sha256(json.dumps(run.manifest.files, sort_keys=True).encode()).hexdigest()

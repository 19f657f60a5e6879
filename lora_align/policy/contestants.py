"""Who is measured: a mix, a run, an adapter, a direction that is asked for, the start policy, or the raw base."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.policy import blend, vectors
from lora_align.policy.blend import ConditionedPolicy, check_stands_on
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.want import scores_asked
from lora_align.weights import parse_weights

if TYPE_CHECKING:  # words are understood without torch
    from lora_align.model.base import Base

BASE, START, MIX = "base", "start", "mix"  # words that name a contestant by themselves
WANT = "want"  # before a direction, or before a policy and what it is asked for


@dataclass(frozen=True)
class Policy:
    """A name, what lies over the base and how much of it, and the system message that asks for something."""

    name: str
    weights: Mapping[str, float]
    system: str = ""


@dataclass(frozen=True)
class PolicySet:
    """All who are measured, on one base; `vectors` are what any of them is made of, the start adapter aside."""

    base: "Base"
    contestants: Sequence[Policy]
    vectors: Mapping[str, Vector]
    start: Run | None

    def lineage(self, contestant: Policy) -> dict[str, Any]:
        """What names a contestant, whatever it is called: the files of what lies over the base, and the weights."""
        from lora_align.policy import start as start_policy

        made = [
            [weight, self.vectors[name].lineage()]
            for name, weight in contestant.weights.items()
            if weight and name in self.vectors
        ]
        start = start_policy.identity(self.start) if contestant.weights.get(START) else ""
        parts = sorted(made, key=json.dumps)
        return {"base": self.base.identity, "start": start, "made_of": parts, "system": contestant.system}


Named = tuple[Policy, Mapping[str, Vector]]  # with the vectors it is made of


def find_policies(words: Sequence[str], recipe: Recipe, runs_dir: Path, screen: Screen) -> list[Named]:
    """Those that words name: `helpful=1,harmless=0.5`, `want:helpfulness=0.8`, `want@rsf/rsf/t2:helpfulness=0.8`, a
    run's or an adapter's folder, `start`, `base`, or `mix` for the newest one."""
    return [_contestant(word, recipe, runs_dir, screen) for word in words]


def policy_set(everyone: Sequence[Named], recipe: Recipe, base: "Base", runs_dir: Path, screen: Screen) -> PolicySet:
    """All of them on one base, after a check that they stand on it."""
    from lora_align.policy import start as start_policy

    start = start_policy.adapter(recipe, runs_dir)
    found = {name: vector for _, made_of in everyone for name, vector in made_of.items()}
    check_stands_on(base, start_policy.identity(start), found.values())
    for vector in found.values():
        for doubt in vector.doubts():
            screen.warn(doubt)
    return PolicySet(base, [contestant for contestant, _ in everyone], found, start)


def _asked(word: str, runs_dir: Path, screen: Screen) -> tuple[Run, str]:
    """A policy, the newest or the one behind the @, and the message that asks it for what stands behind the colon: a
    direction, or of SteerLM's scores."""
    folder, _, asked = word.removeprefix(WANT).partition(":")
    if not folder:
        policy = ConditionedPolicy.newest(runs_dir, asked, screen)
        return policy.run, policy.system()
    inside = runs_dir / folder[1:]
    run = runs.read(inside if runs.is_run(inside) else Path(folder[1:]))
    if run.manifest.stage != "rsf":
        raise UserError(f"{word}: {run.path} is a run of {run.manifest.stage}; `rsf` trains policies that can be asked")
    if not blend.takes_scores(run):
        return run, ConditionedPolicy.of(run, asked, screen).system()
    scores, objectives = parse_weights(asked), run.manifest.method["objectives"]
    if set(scores) != set(objectives):
        raise UserError(f"{word}: this policy is asked for scores of {' and '.join(objectives)}, from 0 to 100")
    return run, scores_asked({name: scores[name] for name in objectives}, run.manifest.method["steer"])


def _contestant(word: str, recipe: Recipe, runs_dir: Path, screen: Screen) -> Named:
    if word == BASE:
        return Policy(word, {}), {}
    if word == START:
        return Policy(word, {START: 1.0}), {}
    if word.startswith((f"{WANT}:", f"{WANT}@")):
        run, system = _asked(word, runs_dir, screen)
        name = run.path.as_posix()
        return Policy(word, {START: 1.0, name: 1.0}, system), {name: vectors.at(run.path, name)}
    if "=" in word and not Path(word).exists():
        weights = parse_weights(word)
        found = {name: vectors.find(name, runs_dir, recipe.preferences) for name in weights}
        vectors.refuse_start_inside(found.values())
        return Policy(word, {START: 1.0, **weights}), found
    if word == MIX:
        mixes = [run for run in runs.every(runs_dir, screen) if run.manifest.stage == "mix"]
        if not mixes:
            command = runs.command("merge", runs_dir)
            raise UserError(f"no mix in {runs_dir}/: name weights, as in helpful=1, or `{command}` first")
        word = mixes[-1].path.relative_to(runs_dir).as_posix()
    vector = vectors.find(word, runs_dir, recipe.preferences)
    holds_start = any(run.manifest.contains_start or run.manifest.stage == "sft" for run in vector.known_runs())
    return Policy(word, {START: 0.0 if holds_start else 1.0, word: 1.0}), {word: vector}

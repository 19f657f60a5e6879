"""What the policies of an `rsf` series have in common, found and checked before any of them is made."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.data import forms, sources
from lora_align.data.rows import Rated, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.endpoint import Endpoint
from lora_align.model.reward_model import Heads
from lora_align.policy import start as start_policy
from lora_align.recipe import Lora, Recipe, Rsf
from lora_align.rsf import sampling_requests
from lora_align.rsf.candidates import Budgets
from lora_align.runs import Run
from lora_align.train import checkpoints

STEERLM = "steerlm"  # the paper's θ₀; t1, t2 and so on follow


@dataclass(frozen=True)
class RsfInputs:
    """What every policy of a series has in common."""

    recipe: Recipe
    settings: Rsf
    base: Base
    start: Run | None
    reward: Run
    answers: "RatedHalves"
    folder: Path
    force: bool
    server: Endpoint | None
    budgets: Budgets = field(default_factory=Budgets)

    @property
    def lora(self) -> Lora:
        """The shape of the policies' adapters."""
        return self.settings.lora or self.recipe.lora


@dataclass(frozen=True)
class RatedHalves:
    """What a series is made from: in two halves that share no prompt, what was dropped by reason, which columns were
    not read, and its name."""

    halves: tuple[list[Rated], list[Rated]]
    dropped: Mapping[str, int]
    unread: Mapping[str, int]
    fingerprint: str


def teacher_of(label: str) -> str:
    """Whose answers a policy learns from."""
    return "" if label == STEERLM else STEERLM if label == "t1" else f"t{int(label[1:]) - 1}"


def made_alike(
    folder: Path, recipe: Recipe, base: Base, start: Run | None, reward: Run, data: str, teacher: Run | None
) -> Run:
    """A published policy of this series, if it was made of the same things; more iterations may follow it."""
    run = runs.read(folder)
    before = _made_of(run.manifest.recipe, run.manifest.base, run.manifest.data.get("fingerprint"))
    now = _made_of(json.loads(json.dumps(recipe.as_dict())), base.identity, data)
    changed = list(checkpoints.differences(before, now))
    changed += ["another reward model"] if run.manifest.method["reward"] != reward.manifest.files else []
    changed += ["another start policy"] if run.manifest.start != start_policy.identity(start) else []
    changed += (
        [f"another {teacher.path.name}"] if teacher and run.manifest.method["teacher"] != teacher.manifest.files else []
    )
    if changed:
        raise UserError(
            f"{folder} was made differently: {'; '.join(changed)}; "
            "--name NEW keeps both, --force moves the old one aside"
        )
    return run


def _made_of(recipe: Mapping[str, Any], base: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    lora = recipe["rsf"].get("lora") or recipe["lora"]
    return {
        "rsf": {**recipe["rsf"], "lora": lora},
        "base": checkpoints.base_identity(base, recipe["base"]),
        "data": data,
    }


def reward_run(settings: Rsf, base: Base, runs_dir: Path) -> Run:
    """The reward model, if it judges what directions are made of."""
    folder = runs_dir / "reward" / settings.reward
    if not runs.is_run(folder):
        command = runs.command("reward", runs_dir)
        raise UserError(f"no reward model {settings.reward!r} in {runs_dir}/reward: run `{command}`")
    run = runs.read(folder)
    if run.fingerprint != base.fingerprint:
        raise UserError(f"{run.path} was trained on another base ({run.fingerprint[:12]})")
    known = [*Heads.load(run.path).names, *run.manifest.method["objectives"]]
    for name in settings.directions:
        if name not in known:
            raise UserError(f"rsf.directions.{name}: {run.path} has no such objective (it has: {', '.join(known)})")
    if settings.watch not in known and settings.watch != Rsf.watch:  # the default watches where it can
        raise UserError(f"rsf.watch: {run.path} has no objective {settings.watch!r} (it has: {', '.join(known)})")
    return run


def answers_of(settings: Rsf, base: Base) -> RatedHalves:
    """In two halves, as a prompt's text decides."""
    digest = hashlib.sha256()
    halves: tuple[list[Rated], list[Rated]] = ([], [])
    dropped: Counter[str] = Counter()
    prompts: set[str] = set()
    longest = min(settings.max_length, base.max_length)
    longest_ask = max(sorted(sampling_requests.examples(settings)), key=len)
    for _, answers in sources.read(settings, forms.answers, dropped):
        for found in answers:
            if not found.answer.strip():
                dropped["empty answer"] += 1
            elif (
                len(base.chat.prompt_ids(with_system_prompt(longest_ask, found.prompt))) + settings.max_new_tokens
                > longest
            ):
                dropped["prompt too long"] += 1
            else:
                key = prompt_key(found.prompt)
                prompts.add(key)
                halves[int(key[-1], 16) % 2].append(found)  # the first digits say what is held out
                digest.update(json.dumps(asdict(found)).encode())
        if settings.limit and len(prompts) >= settings.limit:
            break
    unread = sources.pop_unread(dropped)
    if not all(halves):
        counted = f"{len(prompts)}; dropped: {dict(dropped)}"
        raise UserError(f"{sources.name(settings)}: too few prompts for two halves ({counted})")
    return RatedHalves(halves, dict(dropped), unread, digest.hexdigest())

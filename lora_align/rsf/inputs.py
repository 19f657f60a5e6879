"""The inputs that all policies of one `rsf` command share, read and checked before the first policy is trained."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import Screen, count
from lora_align.data import pairs, row_reader, sources
from lora_align.data.rows import Rated, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.batch_sampling import ROWS
from lora_align.model.endpoint import Endpoint
from lora_align.model.memory_budget import MemoryBudget
from lora_align.policy import judge_runs, judges, start_policy, vectors
from lora_align.policy.judges import Judge
from lora_align.policy.policy import Policy
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Lora, Recipe, Rsf
from lora_align.rsf import sampling_requests
from lora_align.rsf.serving import serve_command
from lora_align.runs import Manifest, Run
from lora_align.train import checkpoints, lora_trainer
from lora_align.train.job import Target

NAME = "policy"  # the default name of a run's folder of policies
STEERLM = "steerlm"  # the name of θ₀; the later policies are t1, t2, …
JUDGE = "reward"
TEACHER = "teacher"


@dataclass(frozen=True)
class RsfInputs:
    """The inputs that all policies of one `rsf` command share."""

    recipe: Recipe
    settings: Rsf
    base: Base
    start: Run | None
    reward: Run
    judge: Judge
    answers: "RatedHalves"
    folder: Path
    force: bool
    server: Endpoint | None
    screen: Screen
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))  # answers sampled at once, by any policy

    @property
    def lora(self) -> Lora:
        """Return the LoRA shape of the policies."""
        return self.settings.lora or self.recipe.lora

    @property
    def labels(self) -> list[str]:
        """Return the names of all policies, in the order of training."""
        return [STEERLM, *(f"t{t}" for t in range(1, self.settings.iterations + 1))]

    def target(self, label: str) -> Target:
        """Return the target of a policy's training. An unfinished policy is always continued."""
        return Target(self.folder / label, label, self.screen, self.force, resume=True)

    def published(self) -> dict[str, Run]:
        """Return the policies that are published already; refuse those made from other inputs."""
        published: dict[str, Run] = {}
        for label in self.labels if not self.force else ():
            if runs.is_run(self.folder / label):
                if label != STEERLM and teacher_of(label) not in published:
                    raise UserError(
                        f"{self.folder / label} exists, but {teacher_of(label)}, which sampled its answers, does not; "
                        "--force trains all of them again"
                    )
                published[label] = self._same_inputs(self.folder / label, published.get(teacher_of(label)))
                self.screen.note(f"{self.folder / label} is published already")
        return published

    def policies(self, policy: Run | None = None) -> PolicySet:
        """Return a PolicySet of the reward model and, if given, a policy."""
        vector = {TEACHER: vectors.from_folder(policy.path, TEACHER)} if policy else {}
        named = Policy(TEACHER, vector, dict.fromkeys(vector, 1.0))
        return PolicySet(self.base, [named], self.start, {JUDGE: self.judge}, self.budget)

    def manifest(self, data: Mapping[str, Any], steer: str, teacher: Run | None) -> Manifest:
        """Return a policy's manifest before training; `data` counts its examples."""
        return Manifest(
            stage="rsf",
            base=self.base.identity,
            recipe=self.recipe.as_dict(),
            start=start_policy.identity(self.start),
            seeds={"init": self.lora.init_seed, "data": self.settings.seed},
            data={
                "source": sources.name(self.settings),
                "fingerprint": self.answers.fingerprint,
                "dropped": dict(self.answers.dropped),
                **data,
            },
            method={
                "objectives": list(self.settings.directions),
                "ask": self.settings.ask,
                "steer": steer,
                "reward": dict(self.reward.manifest.files),
                "teacher": dict(teacher.manifest.files) if teacher else {},
            },
        )

    def _same_inputs(self, folder: Path, teacher: Run | None) -> Run:
        """Return a published policy. Refuse it if its inputs differ in more than `iterations`, rounding and logging."""
        run = runs.read(folder)
        old = run.manifest
        before = _identity(old.recipe, old.base, old.data.get("fingerprint"))
        now = _identity(json.loads(json.dumps(self.recipe.as_dict())), self.base.identity, self.answers.fingerprint)
        changed = list(checkpoints.differences(before, now))
        if old.method["reward"] != self.reward.manifest.files:
            changed.append("another reward model")
        if old.start != start_policy.identity(self.start):
            changed.append("another start policy")
        if teacher and old.method["teacher"] != teacher.manifest.files:
            changed.append(f"another {teacher.path.name}")
        if changed:
            raise UserError(
                f"{folder} was made differently: {'; '.join(changed)}; "
                "--name NEW keeps both, --force moves the old one aside"
            )
        return run


@dataclass(frozen=True)
class RatedHalves:
    """Rated answers in two halves without common prompts, with counts of prompts, dropped rows and unread columns."""

    halves: tuple[list[Rated], list[Rated]]
    prompts: tuple[int, int]
    dropped: Mapping[str, int]
    unread: Mapping[str, int]
    fingerprint: str


def prepare(
    recipe: Recipe, runs_dir: Path, screen: Screen, *, name: str | None, force: bool, endpoint: str | None
) -> RsfInputs:
    """Read and check the inputs of `rsf`, before slow work."""
    recipe.check_trains("rsf")
    settings = recipe.rsf
    assert settings is not None
    lora_trainer.check_trackers(settings)
    sampling_requests.check_settings(settings)
    base = bases.find(recipe.base)
    runs.check_base(runs_dir, base.identity)
    start = start_policy.adapter(recipe, runs_dir)
    reward, judge = judge_runs.of_reward(settings.reward, runs_dir), judges.reward(base, runs_dir, settings.reward)
    check_objectives(settings, judge.objectives, reward.path)
    for doubt in judge.doubts:
        screen.warn(doubt)
    answers = answers_of(settings, base)
    for warning in sources.unread_warnings(answers.unread):
        screen.warn(f"rsf: {warning}")
    first, second = answers.prompts
    screen.note(f"rsf: {count(first, 'prompt')} for t1, t3, …; {count(second, 'prompt')} for steerlm, t2, t4, …")
    # each policy is later loaded on the server under its own name, such as t1
    server = Endpoint.at(endpoint, NAME, template=recipe.base.chat_template_kwargs) if endpoint else None
    if server:  # fail early if the server cannot load adapters
        server.load_adapter(reward.path, reward.path.name, serve_command(recipe))
    folder = runs_dir / "rsf" / (name or NAME)
    return RsfInputs(recipe, settings, base, start, reward, judge, answers, folder, force, server, screen)


def teacher_of(label: str) -> str:
    """Return the name of a policy's teacher, or "" for θ₀, which has none."""
    return "" if label == STEERLM else STEERLM if label == "t1" else f"t{int(label[1:]) - 1}"


def _identity(recipe: Mapping[str, Any], base: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    lora = recipe["rsf"].get("lora") or recipe["lora"]
    identity = checkpoints.base_identity(base, recipe["base"])
    return {"rsf": {**recipe["rsf"], "lora": lora}, "base": identity, "data": data}


def check_objectives(settings: Rsf, known: Sequence[str], reward: Path) -> None:
    """Refuse a reward model that lacks an objective of the directions."""
    for name in settings.directions:
        if name not in known:
            raise UserError(
                f"rsf.directions.{name}: {reward} has no such objective (its objectives: {', '.join(known)})"
            )
    if settings.watch not in known and settings.watch != Rsf.watch:  # the default may be missing
        raise UserError(f"rsf.watch: {reward} has no objective {settings.watch!r} (it has: {', '.join(known)})")


def answers_of(settings: Rsf, base: Base) -> RatedHalves:
    """Read the answers and split them by the hash of their prompts."""
    digest = hashlib.sha256()
    halves: tuple[list[Rated], list[Rated]] = ([], [])
    dropped: Counter[str] = Counter()
    prompts: tuple[set[str], set[str]] = (set(), set())
    longest = min(settings.max_length, base.max_length)
    longest_ask = max(sorted(sampling_requests.example_messages(settings)), key=len)
    for _, answers in sources.read(settings, row_reader.answers, dropped):
        for answer in answers:
            prompt = with_system_prompt(longest_ask, answer.prompt)
            if not answer.answer.strip():
                dropped["empty answer"] += 1
            elif len(base.chat.prompt_ids(prompt)) + settings.max_new_tokens > longest:
                dropped["prompt too long"] += 1
            else:
                key = prompt_key(answer.prompt)
                half = int(key[-1], 16) % 2  # by the last hex digit, because the first decide which are held out
                prompts[half].add(key)
                halves[half].append(answer)
                digest.update(json.dumps(asdict(answer)).encode())
        if settings.limit and sum(map(len, prompts)) >= settings.limit:
            break
    unread = sources.pop_unread(dropped)
    if not all(halves):
        lost = f" (dropped: {pairs.reasons(dropped)})" if dropped else ""
        raise UserError(
            f"{sources.name(settings)}: {count(sum(map(len, prompts)), 'prompt')} cannot be split into two halves"
            f"{lost}; give rsf more prompts"
        )
    return RatedHalves(halves, (len(prompts[0]), len(prompts[1])), dict(dropped), unread, digest.hexdigest())

"""Several policies and judges on one loaded base. One policy or judge is active at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_align.adapters import peft_format
from lora_align.console import Screen
from lora_align.data.rows import Prompt
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.batch_sampling import ROWS, Guide, LocalSampler
from lora_align.model.endpoint import Endpoint
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.sampler_protocol import Sampler
from lora_align.policy import start_policy, vectors
from lora_align.policy.judges import Judge, Scores, tokenise_answer
from lora_align.policy.policy import START, Policy, check_base_and_start
from lora_align.recipe import Recipe
from lora_align.runs import Run


class PolicySet:
    """Policies on one base. The base and all adapters are loaded at the first activation or scoring."""

    def __init__(
        self,
        base: Base,
        policies: Sequence[Policy],
        start: Run | None,
        judges: Mapping[str, Judge] | None = None,
        budget: MemoryBudget | None = None,
        server: Endpoint | None = None,
    ) -> None:
        self.base, self.policies, self.start, self.judges = base, policies, start, judges or {}
        self.budget = budget or MemoryBudget(ROWS)  # answers sampled at once
        self.server = server  # samples the answers in place of the local model
        self.vectors = {name: vector for policy in policies for name, vector in policy.vectors.items()}

    @classmethod
    def of(
        cls,
        policies: Sequence[Policy],
        recipe: Recipe,
        base: Base,
        runs_dir: Path,
        screen: Screen,
        judges: Mapping[str, Judge] | None = None,
        server: Endpoint | None = None,
    ) -> "PolicySet":
        """Check that policies were trained on a recipe's base and start adapter; warn of doubtful ones and judges."""
        start = start_policy.adapter(recipe, runs_dir)
        made = cls(base, policies, start, judges, server=server)
        for policy in policies if server else ():
            named = "=" in policy.name if policy.vectors else not (policy.start and start)
            if policy.conditioned or policy.strength != 1 or not named:
                raise UserError(f"--endpoint: {policy.name} has no name on the server; name weights, as in helpful=1")
        check_base_and_start(base, start_policy.identity(start), made.vectors.values())
        warnings = [warning for vector in made.vectors.values() for warning in vector.warnings()]
        doubts = [doubt for judge in made.judges.values() for doubt in judge.doubts]
        for warning in dict.fromkeys([*warnings, *doubts]):
            screen.warn(warning)
        return made

    @cached_property
    def model(self) -> PreTrainedModel:
        """Return the base; load it at the first call."""
        return self.base.load()

    @cached_property
    def sampler(self) -> LocalSampler:
        """Return the sampler of all policies. There is one, because it remembers how many answers fit into memory."""
        return LocalSampler(self.model, self.base, self.budget)

    def sampler_of(self, policy: Policy) -> Sampler:
        """Activate a policy, and return its sampler. On a server, the weights are the name of the model."""
        if self.server:
            return replace(self.server, model=policy.name) if policy.vectors else self.server
        self.activate(policy)
        return (
            replace(self.sampler, guide=Guide(policy.system, policy.strength)) if policy.strength != 1 else self.sampler
        )

    @cached_property
    def mixer(self) -> Mixer:
        """Return the mixer, which adds every adapter to the base, at first with weight 0."""
        updates, _ = vectors.load_updates(self.vectors)
        if self.start is not None:
            updates[START] = peft_format.load(self.start.path, whole=True)
        for judge in self.judges.values():
            updates |= judge.updates
        return Mixer(self.model, updates, {})

    def activate(self, policy: Policy) -> None:
        """Make the model answer as this policy from now on."""
        self.mixer.set(policy.scales)

    def score(self, judge: str, answers: Sequence[tuple[Prompt, str]]) -> list[Scores]:
        """Return a judge's scores of answers to prompts. An answer gets {} if its prompt fills the context.

        The judge sees the prompts as given. Equal answers to a prompt are scored once.
        """
        tokens = {pair: tokenise_answer(self.base, *pair) for pair in dict.fromkeys(answers)}
        scores = iter(self.judges[judge].score(self.model, self.mixer, [one for one in tokens.values() if one]))
        scores_of = {pair: next(scores) if one else {} for pair, one in tokens.items()}
        return [scores_of[pair] for pair in answers]

    def lineage(self, policy: Policy) -> dict[str, Any]:
        """Return what identifies a policy apart from its name: base, adapters, weights, and system message."""
        parts = [[weight, policy.vectors[name].lineage()] for name, weight in policy.weights.items() if weight]
        start = start_policy.identity(self.start) if policy.start else ""
        ordered = sorted(parts, key=json.dumps)
        guided = {"strength": policy.strength} if policy.strength != 1 else {}
        return {"base": self.base.identity, "start": start, "made_of": ordered, "system": policy.system, **guided}

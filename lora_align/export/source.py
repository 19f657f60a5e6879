"""Find what to export: the updates of a policy, its base, and where both come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_align.adapters.merge_options import MergeOptions
from lora_align.adapters.streamed_merge import Merge
from lora_align.commands.merge import default_name, opened
from lora_align.console import Screen
from lora_align.mix_weights import name_of
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.policy import start_policy
from lora_align.policy.loading import warn_of
from lora_align.policy.policy import START, Policy, check_base_and_start
from lora_align.recipe import Recipe
from lora_align.runs import Run


@dataclass(frozen=True)
class Source:
    """A policy to export, the merge that computes its update, and its base, which is not loaded."""

    policy: Policy
    merge: Merge
    base: Base
    start: Run | None  # the start adapter, if the update contains it and it is in the runs folder
    runs_dir: Path

    @property
    def name(self) -> str:
        """Return a name without special characters, such as `helpful1_harmless0p5`, or the name of a run."""
        vectors = self.policy.vectors
        if list(self.policy.weights.values()) == [1.0] and all(len(vector.parents) == 1 for vector in vectors.values()):
            return name_of(Path(key).name for key in vectors) or "mix"
        return default_name(self.policy.weights)

    @property
    def weights(self) -> str:
        """Return the weights, as in `helpful=1,harmless=0.5`."""
        return ",".join(f"{name}={weight:.15g}" for name, weight in self.policy.weights.items())

    def each(self) -> Mapping[str, Merge]:
        """Return the merges of the single vectors at weight 1, and of the start adapter if the policy has one."""
        parts = {name: Merge({name: update}, {name: 1.0}) for name, update in self.merge.vectors.items()}
        start = {START: Merge({START: self.merge.start}, {START: 1.0})} if self.merge.start else {}
        return {**parts, **start}


def find_source(policy: Policy, recipe: Recipe, runs_dir: Path, screen: Screen) -> Source:
    """Find the adapters and the base of a policy. Warn as the commands do that sample from it."""
    inputs = opened(policy.weights, policy.vectors, runs_dir, MergeOptions(with_start=bool(policy.start)))
    base = bases.find(recipe.base)
    check_base_and_start(base, inputs.start, policy.vectors.values())
    warn_of(policy, base, runs_dir, screen)
    has_start = bool(inputs.merge.start) or (policy.contains_start and inputs.start)
    start = start_policy.published(runs_dir, inputs.start) if has_start else None
    return Source(policy, inputs.merge, base, start, runs_dir)

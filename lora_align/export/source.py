"""Find what to export: the updates of a policy, its base, and where both come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_align.adapters.merge_options import MergeOptions
from lora_align.adapters.streamed_merge import Merge
from lora_align.commands.merge import default_name, prepare
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.policy import safe_ranges
from lora_align.policy.policy import START, Policy, check_base_and_start, find_policy
from lora_align.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A policy to export, the merge that computes its update, and its base, which is not loaded."""

    policy: Policy
    merge: Merge
    base: Base
    runs_dir: Path

    @property
    def name(self) -> str:
        """Return a name without special characters, such as `helpful1_harmless0p5`."""
        return default_name(self.policy.weights)

    @property
    def weights(self) -> str:
        """Return the weights, as in `helpful=1,harmless=0.5`."""
        return ",".join(f"{name}={weight:g}" for name, weight in self.policy.weights.items())

    def each(self) -> Mapping[str, Merge]:
        """Return the merges of the single vectors at weight 1, and of the start adapter if the policy has one."""
        parts = {name: Merge({name: update}, {name: 1.0}) for name, update in self.merge.vectors.items()}
        start = {START: Merge({START: self.merge.start}, {START: 1.0})} if self.merge.start else {}
        return {**parts, **start}


def find_source(name: str, recipe: Recipe, runs_dir: Path, screen: Screen) -> Source:
    """Return the policy of this name and its base. Warn of weights beyond their safe range."""
    policy = find_policy(name, recipe, runs_dir, screen)
    if not policy.vectors:
        raise UserError(f"{name}: this policy has no adapter to export; name weights, a run or an adapter folder")
    inputs = prepare(policy.weights, recipe, runs_dir, MergeOptions(with_start=bool(policy.start)), policy.vectors)
    far = safe_ranges.warnings_beyond_reach(policy.weights, policy.vectors, runs_dir)
    for warning in [*policy.warnings(), *far]:
        screen.warn(warning)
    base = bases.find(recipe.base)
    check_base_and_start(base, inputs.start, policy.vectors.values())
    return Source(policy, inputs.merge, base, runs_dir)

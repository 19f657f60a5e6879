"""Load one policy on its base, for `chat` and `generate`: the start adapter, the vectors, and warnings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_align.console import Screen
from lora_align.model.base import Base
from lora_align.model.batch_sampling import Guide, LocalSampler
from lora_align.model.mixer import Mixer
from lora_align.policy import safe_ranges, start_policy, vectors
from lora_align.policy.policy import Policy, check_base_and_start
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe


@dataclass(frozen=True)
class LoadedPolicy:
    """A model that answers as a policy.

    `fixed` means that the weights cannot change: the mix contains a start adapter that is not available by itself.
    """

    base: Base
    policy: Policy
    model: PreTrainedModel
    mixer: Mixer | None
    start: str  # identity of the start adapter
    fixed: bool

    @property
    def sampler(self) -> LocalSampler:
        """Return a sampler of the policy."""
        guide = Guide(self.policy.system, self.policy.strength) if self.policy.strength != 1 else None
        return LocalSampler(self.model, self.base, guide=guide)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return what identifies the model of the answers: base, start adapter, adapters and weights."""
        adapters = [parent.lineage() for vector in self.policy.vectors.values() for parent in vector.parents]
        weights = dict(self.policy.weights)
        return {"base": self.base.identity, "start": self.start, "adapters": adapters, "weights": weights}


def load_policy(base: Base, recipe: Recipe, policy: Policy, runs_dir: Path, screen: Screen) -> LoadedPolicy:
    """Load the base, the start adapter and a policy's vectors; warn of weights beyond what `reach` found safe."""
    mixed, fixed, start, start_id = dict(policy.vectors), False, None, ""
    if policy.contains_start:
        _, start_id = vectors.common_base(mixed.values())
        start = start_policy.published(runs_dir, start_id)
        fixed = start is None
        if start is not None:  # subtract it from the mix, so that the weight of the mix does not scale it
            mixed = {name: vector.without(start) for name, vector in mixed.items()}
    elif policy.start:
        start = start_policy.adapter(recipe, runs_dir)
        start_id = start_policy.identity(start)
    check_base_and_start(base, start_id, policy.vectors.values())
    if policy.contains_start:
        screen.note(f"start adapter: contained in {policy.name}")
    elif start is not None:
        screen.note(f"start adapter: {start.path}, added")
    warn_of(policy, base, runs_dir, screen)
    model = start_policy.load(base, start)
    mixer = Mixer(model, {name: vector.load() for name, vector in mixed.items()}, policy.weights) if mixed else None
    return LoadedPolicy(base, policy, model, mixer, start_id, fixed)


def warn_of(policy: Policy, base: Base, runs_dir: Path, screen: Screen) -> None:
    """Warn of a policy's vectors, of a base that differs from training, and of weights beyond their safe range."""
    far = safe_ranges.warnings_beyond_reach(policy.weights, policy.vectors, runs_dir)
    for warning in [*policy.warnings(), *_differences(base, policy.vectors.values()), *far]:
        screen.warn(warning)


def _differences(base: Base, policy_vectors: Iterable[Vector]) -> list[str]:
    """Return a warning for each property of the base, except its weights, that differs from training."""
    theirs, _ = vectors.common_base(policy_vectors)
    words = {"chat_format": "chat template or tokenizer", "quantization": "quantization"}
    ours = base.identity
    return [
        f"the {name} of the recipe is not that of the vectors' training, so answers may be worse; name their recipe "
        "with --recipe"
        for key, name in words.items()
        if theirs and theirs.get(key) != ours[key]
    ]

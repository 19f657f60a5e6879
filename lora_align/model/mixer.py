"""Low-rank updates laid over a frozen base: y ← y + B (s ∘ (A x)), with s turned while the model is in use."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_align.adapters.delta import Factors, LoraDelta, stacked
from lora_align.console import inert
from lora_align.errors import UserError


class Mixer:
    """All updates stacked into one branch a layer. The factors never change; only the vector s does.

    A weight of 0 is therefore exactly reversible, and turning one costs nothing.
    PEFT may wrap the layers afterwards: it then sees base and branches as one frozen layer.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, LoraDelta], weights: Mapping[str, float]) -> None:
        self.updates = {name: LoraDelta.of(dict(update)) for name, update in updates.items()}
        layers = dict(model.named_modules())
        names = dict.fromkeys(module for update in self.updates.values() for module in update)
        parts = {
            module: {name: update[module] for name, update in self.updates.items() if module in update}
            for module in names
        }
        fitting = {module: _fitting(layers.get(module), module, found) for module, found in parts.items()}
        self.branches = [_Branch(layer, parts[module]) for module, layer in fitting.items()]
        self.set(weights)

    def set(self, weights: Mapping[str, float]) -> None:
        """Give each update its weight, from the next token on; one that is not named gets 0."""
        self.weights = {name: weights.get(name, 0.0) for name in self.updates}
        for branch in self.branches:
            branch.set(self.weights)

    def remove(self) -> None:
        """Leave the base as it was."""
        for branch in self.branches:
            branch.hook.remove()


class _Branch:
    """One layer's updates. What lies before the first and after the last that has a weight is not computed."""

    def __init__(self, layer: nn.Linear, parts: Mapping[str, Factors]) -> None:
        whole, where = stacked(list(parts.values())), layer.weight.device
        self.A, self.B = whole.A.to(where, torch.float32), whole.B.to(where, torch.float32)
        self.ranks = {name: part.rank for name, part in parts.items()}
        self.set({})
        self.hook = layer.register_forward_hook(self)

    @torch.inference_mode(False)  # what is set while answers are drawn may lie under an adapter that is trained
    def set(self, weights: Mapping[str, float]) -> None:
        """Narrow A and B to the stretch that counts, and give it its s."""
        scale = [weights.get(name, 0.0) for name, rank in self.ranks.items() for _ in range(rank)]
        live = [i for i, weight in enumerate(scale) if weight]
        stretch = slice(live[0], live[-1] + 1) if live else slice(0)
        self.live_A, self.live_B = self.A[stretch], self.B[:, stretch]
        self.scale = torch.tensor(scale[stretch], device=self.A.device)

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a forward hook."""
        if not len(self.scale):
            return output
        inner = nn.functional.linear(inputs[0].to(self.A.dtype), self.live_A) * self.scale
        return output + nn.functional.linear(inner, self.live_B).to(output.dtype)


def _fitting(layer: nn.Module | None, name: str, parts: Mapping[str, Factors]) -> nn.Linear:
    """The layer updates belong on, or an error that says how the base differs."""
    found = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else "not there"
    for factors in parts.values():
        wanted = (factors.B.shape[0], factors.A.shape[1])
        if not isinstance(layer, nn.Linear) or found != wanted:
            raise UserError(
                f"the adapter was not made for this base: its {inert(name)} is {wanted}, the base's is {found}"
            )
    assert isinstance(layer, nn.Linear)
    return layer

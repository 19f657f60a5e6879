"""Low-rank updates laid over a frozen base: y ← y + B (s ∘ (A x)), with s turned while the model is in use."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_align.adapters.delta import Factors, LoraDelta, total
from lora_align.console import inert
from lora_align.errors import UserError


class Mixer:
    """All updates stacked into one branch a layer. The factors never change; only the vector s does.

    A weight of 0 is therefore exactly reversible, and turning one costs nothing.
    PEFT may wrap the layers afterwards: it then sees base and branches as one frozen layer.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, LoraDelta], weights: Mapping[str, float]) -> None:
        self.updates = dict(updates)
        stacked = total(list(self.updates.values()))
        modules = dict(model.named_modules())
        layers = {name: _fitting(modules.get(name), name, factors) for name, factors in stacked.items()}
        self.scales: dict[str, Tensor] = {}
        self.hooks = []
        for name, factors in stacked.items():
            layer = layers[name]
            where = layer.weight.device
            A, B = factors.A.to(where, torch.float32), factors.B.to(where, torch.float32)
            self.scales[name] = torch.zeros(factors.rank, device=where)
            self.hooks.append(layer.register_forward_hook(_branch(A, B, self.scales[name])))
        self.set(weights)

    def set(self, weights: Mapping[str, float]) -> None:
        """Give each update its weight, from the next token on; one that is not named gets 0."""
        self.weights = {name: weights.get(name, 0.0) for name in self.updates}
        for module, scale in self.scales.items():
            start = 0
            for name, update in self.updates.items():
                if module in update:
                    end = start + update[module].rank
                    scale[start:end] = self.weights[name]
                    start = end

    def remove(self) -> None:
        """Leave the base as it was."""
        for hook in self.hooks:
            hook.remove()


def _fitting(layer: nn.Module | None, name: str, factors: Factors) -> nn.Linear:
    """The layer an update belongs on, or an error that says how the base differs."""
    wanted = (factors.B.shape[0], factors.A.shape[1])
    found = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else "not there"
    if not isinstance(layer, nn.Linear) or found != wanted:
        raise UserError(f"the adapter was not made for this base: its {inert(name)} is {wanted}, the base's is {found}")
    return layer


def _branch(A: Tensor, B: Tensor, scale: Tensor):  # type: ignore[no-untyped-def]
    """A forward hook that adds B (s ∘ (A x)) to a layer's output."""

    def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = nn.functional.linear(inputs[0].to(A.dtype), A) * scale
        return output + nn.functional.linear(inner, B).to(output.dtype)

    return add

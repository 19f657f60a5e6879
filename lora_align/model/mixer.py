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
        self.updates = {name: LoraDelta.of(dict(update)) for name, update in updates.items()}
        modules = dict(model.named_modules())
        fitting = {
            name: (_fitting(modules.get(name), name, factors), factors)
            for name, factors in total(list(self.updates.values())).items()
        }
        self.hooks = []
        self.scales: list[tuple[Tensor, Tensor]] = []  # a device's s for all its layers, and whose weight each entry is
        for device in {layer.weight.device for layer, _ in fitting.values()}:
            here = {name: found for name, found in fitting.items() if found[0].weight.device == device}
            owners = [owner for name in here for owner in self._owners(name)]
            scale = torch.zeros(len(owners), device=device)
            self.scales.append((scale, torch.tensor(owners, device=device, dtype=torch.long)))
            parts = scale.split([factors.rank for _, factors in here.values()])
            for (layer, factors), part in zip(here.values(), parts, strict=True):
                A, B = factors.A.to(device, torch.float32), factors.B.to(device, torch.float32)
                self.hooks.append(layer.register_forward_hook(_branch(A, B, part)))
        self.set(weights)

    def set(self, weights: Mapping[str, float]) -> None:
        """Give each update its weight, from the next token on; one that is not named gets 0."""
        self.weights = {name: weights.get(name, 0.0) for name in self.updates}
        values = torch.tensor(list(self.weights.values()))
        for scale, owners in self.scales:
            scale.copy_(values.to(scale.device)[owners])

    def _owners(self, module: str) -> list[int]:
        """Which update each column of a module's stacked B comes from."""
        having = [(number, update) for number, update in enumerate(self.updates.values()) if module in update]
        return [number for number, update in having for _ in range(update[module].rank)]

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

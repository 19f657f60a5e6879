"""Low-rank updates laid over a frozen base: y ← y + B (s ∘ (A x)), with s turned while the model is in use."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lora_align.adapters.delta import Factors, LoraDelta, stacked
from lora_align.console import inert
from lora_align.errors import UserError


class Mixer:
    """All updates stacked into one branch a layer. The factors never change; only the vector s does.

    A weight of 0 is therefore exactly reversible, and turning one costs nothing: every layer's s lies in one tensor.
    PEFT may wrap the layers afterwards: it then sees base and branches as one frozen layer.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, LoraDelta], weights: Mapping[str, float]) -> None:
        self.updates = {name: LoraDelta.of(dict(update)) for name, update in updates.items()}
        layers = dict(model.named_modules())
        names = dict.fromkeys(name for update in self.updates.values() for name in update)
        parts = {
            module: {name: update[module] for name, update in self.updates.items() if module in update}
            for module in names
        }
        fitting = {module: _fitting(layers.get(module), module, found) for module, found in parts.items()}
        self.branches = [_Branch(layer, parts[module]) for module, layer in fitting.items()]  # all of them, or none
        places = {name: place for place, name in enumerate(self.updates)}
        owners = [places[name] for branch in self.branches for name in branch.owners]
        where = self.branches[0].A.device if self.branches else None
        self.owners = torch.tensor(owners, dtype=torch.long, device=where)
        self.scales = torch.zeros(len(owners), device=where)
        self.weights: dict[str, float] = {}
        self.live: set[str] | None = None  # whose weights are not 0; unknown to begin with, and while they are steered
        self.set(weights)

    @torch.inference_mode(False)  # what is set while answers are drawn may lie under an adapter that is trained
    def set(self, weights: Mapping[str, float]) -> None:
        """Give each update its weight, from the next token on; one that is not named gets 0."""
        self.weights = {name: weights.get(name, 0.0) for name in self.updates}
        values = torch.tensor(list(self.weights.values()), device=self.scales.device)
        self.scales.copy_(values[self.owners])
        live = {name for name, weight in self.weights.items() if weight}
        if live != self.live:
            self._narrow(live, self.scales)
        self.live = live

    def steer(self, weights: Mapping[str, Tensor]) -> None:
        """Give updates weights that a gradient flows to, until `set` is called; the others get 0."""
        none = torch.zeros((), device=self.scales.device)
        values = torch.stack([weights.get(name, none).to(none) for name in self.updates])
        self.weights, self.live = {}, None
        self._narrow(weights, values[self.owners])

    def _narrow(self, live: Collection[str], scales: Tensor) -> None:
        parts = scales.split([len(branch.owners) for branch in self.branches])
        for branch, scale in zip(self.branches, parts, strict=True):
            branch.narrow(live, scale)

    def remove(self) -> None:
        """Leave the base as it was."""
        for branch in self.branches:
            branch.hook.remove()


class _Branch:
    """One layer's updates. What lies before the first and after the last that has a weight is not computed."""

    def __init__(self, layer: nn.Linear, parts: Mapping[str, Factors]) -> None:
        whole, where = stacked(list(parts.values())), layer.weight.device
        self.A, self.B = whole.A.to(where, torch.float32), whole.B.to(where, torch.float32)
        self.owners = [name for name, part in parts.items() for _ in range(part.rank)]
        self.hook = layer.register_forward_hook(self)

    def narrow(self, live: Collection[str], scale: Tensor) -> None:
        """To the stretch that counts of A, B and s."""
        places = [i for i, name in enumerate(self.owners) if name in live]
        stretch = slice(places[0], places[-1] + 1) if places else slice(0)
        self.live_A, self.live_B, self.scale = self.A[stretch], self.B[:, stretch], scale[stretch]

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a forward hook."""
        if not len(self.scale):
            return output
        with torch.autocast(output.device.type, enabled=False):  # in float32 also where a trainer computes in 16 bit
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

"""Mixing of low-rank updates on a frozen base: y ← y + B (s ∘ (A x)), where s changes at run time."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_align.adapters.delta import Factors, LoraDelta, stacked
from lora_align.errors import UserError


class Mixer:
    """Adds weighted updates to the layers of a model, stacked into one branch per layer.

    The factors A and B never change; only s does. A weight of 0 therefore restores the base exactly. Setting weights is
    cheap, because one tensor holds the s of all layers. PEFT may wrap the layers afterwards: it sees base and branch as
    one frozen layer.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, LoraDelta], weights: Mapping[str, float]) -> None:
        self.updates = {name: LoraDelta.of(dict(update)) for name, update in updates.items()}
        layers = dict(model.named_modules())
        names = dict.fromkeys(name for update in self.updates.values() for name in update)
        parts = {
            module: {name: update[module] for name, update in self.updates.items() if module in update}
            for module in names
        }
        fitting = {module: _fitting(layers.get(module), module, factors) for module, factors in parts.items()}
        self.branches = [_Branch(layer, parts[module]) for module, layer in fitting.items()]
        places = {name: place for place, name in enumerate(self.updates)}
        owners = [places[name] for branch in self.branches for name in branch.owners]
        where = self.branches[0].A.device if self.branches else None
        self.owners = torch.tensor(owners, dtype=torch.long, device=where)
        self.scales = torch.zeros(len(owners), device=where)
        self.weights: dict[str, float] = {}
        # updates with a weight other than 0; None before `set`, and after `set_rows` and `steer`
        self.live: set[str] | None = None
        self.set(weights)
        # last, so that a failure leaves the model as it was
        layers_and_branches = zip(fitting.values(), self.branches, strict=True)
        self.hooks = [layer.register_forward_hook(branch) for layer, branch in layers_and_branches]

    @torch.inference_mode(False)  # the tensors may be used in training later, even if set during sampling
    def set(self, weights: Mapping[str, float]) -> None:
        """Set the weights for all later forward passes. Updates that `weights` does not name get 0."""
        self.weights = {name: weights.get(name, 0.0) for name in self.updates}
        values = torch.tensor(list(self.weights.values()), device=self.scales.device)
        self.scales.copy_(values[self.owners])
        live = {name for name, weight in self.weights.items() if weight}
        if live != self.live:
            self._narrow(live, self.scales)
        self.live = live

    @torch.inference_mode(False)
    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Set the weights of each row of the next batches, or of all rows. Updates that a row does not name get 0."""
        for name in {name for row in rows for name in row}:
            self.updates[name]  # a KeyError names an update that is missing
        values = torch.tensor([[row.get(name, 0.0) for name in self.updates] for row in rows])
        live = {name for name, of in zip(self.updates, values.T.tolist(), strict=True) if any(of)}
        self.weights, self.live = {}, None
        self._narrow(live, values.to(self.owners.device)[:, None, self.owners])  # [rows, 1, owners]

    def steer(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights as tensors that receive gradients, until `set` is called. Updates not named get 0."""
        none = torch.zeros((), device=self.scales.device)
        values = torch.stack([weights.get(name, none).to(none) for name in self.updates])
        self.weights, self.live = {}, None
        self._narrow(weights, values[self.owners])

    def _narrow(self, live: Collection[str], scales: Tensor) -> None:
        parts = scales.split([len(branch.owners) for branch in self.branches], dim=-1)
        for branch, scale in zip(self.branches, parts, strict=True):
            branch.narrow(live, scale)

    def remove(self) -> None:
        """Remove the branches from the model."""
        for hook in self.hooks:
            hook.remove()


class _Branch:
    """The updates of one layer, as a forward hook that computes only the slice with all nonzero weights."""

    def __init__(self, layer: nn.Linear, parts: Mapping[str, Factors]) -> None:
        whole, where = stacked(list(parts.values())), layer.weight.device
        self.A, self.B = whole.A.to(where, torch.float32), whole.B.to(where, torch.float32)
        self.owners = [name for name, part in parts.items() for _ in range(part.rank)]
        ends = list(itertools.accumulate(part.rank for part in parts.values()))
        self.spans = {name: (end - parts[name].rank, end) for name, end in zip(parts, ends, strict=True)}

    def narrow(self, live: Collection[str], scale: Tensor) -> None:
        """Select the smallest slice of A, B and s that holds all live updates."""
        spans = [self.spans[name] for name in live if name in self.spans]
        part = slice(min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else slice(0)
        self.live_A, self.live_B, self.scale = self.A[part], self.B[:, part], scale[..., part]

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not len(self.live_A):
            return output
        x, scale = inputs[0], self.scale
        if scale.dim() == 3 and x.dim() == 2:  # some layers of mixtures of experts get [rows · t, d]
            scale = scale.repeat(1, len(x) // len(scale), 1).flatten(0, 1)
        with torch.autocast(output.device.type, enabled=False):  # float32 even under autocast
            inner = nn.functional.linear(x.to(self.A.dtype), self.live_A) * scale
            return output + nn.functional.linear(inner, self.live_B).to(output.dtype)


def _fitting(layer: nn.Module | None, name: str, parts: Mapping[str, Factors]) -> nn.Linear:
    """Return the layer if the updates fit, else raise an error that names the difference."""
    shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else ()
    for adapter, factors in parts.items():
        wanted = (factors.B.shape[0], factors.A.shape[1])
        if not isinstance(layer, nn.Linear) or shape != wanted:
            raise UserError(
                f"{adapter}: the adapter was made for another base: its update of {name} is "
                f"{'×'.join(map(str, wanted))}, the base's layer is {'×'.join(map(str, shape)) or 'missing'}; name the "
                "adapter's own base or recipe"
            )
    assert isinstance(layer, nn.Linear)
    return layer

"""The reward model: a 4-bit base with a LoRA adapter, and linear heads on the last hidden state of an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_align.adapters import peft_format
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.logprobs import Answered
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.packing import Backbone

HEADS = "heads.safetensors"
ADAPTER = "reward"


class Heads(nn.Module):
    """Linear heads in float32, never quantised.

    They predict standardised scores. `points` converts these to the scale of the ratings.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, means: Mapping[str, float], deviations: Mapping[str, float]) -> None:
        super().__init__()
        self.names = list(means)
        self.weight = nn.Parameter(torch.zeros(len(self.names), width))
        self.bias = nn.Parameter(torch.zeros(len(self.names)))
        self.register_buffer("mean", torch.tensor([float(means[name]) for name in self.names]))
        self.register_buffer("deviation", torch.tensor([float(deviations[name]) for name in self.names]))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [n, d] to standardised scores [n, k], in float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)

    def points(self, standard: Tensor) -> Tensor:
        """Convert standardised scores [n, k] to points. Points are not clamped to 0–100."""
        return self.mean + self.deviation * standard

    def save(self, folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / HEADS, metadata={"names": "\n".join(self.names)})

    @classmethod
    def load(cls, folder: Path) -> "Heads":
        try:
            with safe_open(folder / HEADS, "pt") as file:
                names = file.metadata()["names"].split("\n")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            heads = cls(tensors["weight"].shape[1], dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))
            heads.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as fault:
            raise UserError(f"{folder / HEADS}: not a reward model's heads ({fault}); train it again") from fault
        return heads


@dataclass(frozen=True)
class RewardModel:
    """A loaded, frozen reward model. Each objective is a head, or a mean of heads that the recipe defines."""

    base: Base
    model: PreTrainedModel
    heads: Heads
    derived: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, base: Base, folder: Path, derived: Mapping[str, Sequence[str]]) -> "RewardModel":
        """Load the base, the adapter and the heads."""
        model = base.load()
        Mixer(model, {ADAPTER: peft_format.load(folder, whole=True)}, {ADAPTER: 1.0})
        return cls(base, model, Heads.load(folder).to(model.device), derived)

    @property
    def objectives(self) -> list[str]:
        """Return the names of the columns that `score` returns."""
        return [*self.heads.names, *self.derived]

    @torch.inference_mode()
    def score(
        self, rows: Sequence[Answered], budget: MemoryBudget, report: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """Return the scores of tokenised answers in points: [n, objectives], float32, on the CPU."""
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        backbone = Backbone.of(self.model)
        scores = torch.empty(len(rows), len(self.heads.names))
        todo = order

        def batch(count: int) -> int:
            picked = todo[:count]
            states = backbone.states([rows[i] for i in picked])
            scores[picked] = self.heads.points(self.heads(torch.stack([of[-1] for of in states]))).cpu()
            return len(picked)

        while todo:
            todo = todo[budget.attempt(batch) or 0 :]
            report(len(order) - len(todo))
        means = [scores[:, [self.heads.names.index(head) for head in heads]].mean(1) for heads in self.derived.values()]
        return torch.cat([scores, *(mean[:, None] for mean in means)], dim=1)

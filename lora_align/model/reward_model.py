"""One frozen 4-bit backbone with LoRA, and k linear heads on the hidden state of an answer's last token."""

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
    """Linear heads in float32, never quantised. They learn standard scores; `points` puts them on the raters' scale."""

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
        """Hidden states [n, d] to standard scores [n, k], in float32 also where a trainer computes in 16 bit."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)

    def points(self, standard: Tensor) -> Tensor:
        """Standard scores [n, k] as points from 0 to 100, or beyond them."""
        return self.mean + self.deviation * standard

    def save(self, folder: Path) -> None:
        """Beside the adapter, with the heads' names in the file."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / HEADS, metadata={"names": "\n".join(self.names)})

    @classmethod
    def load(cls, folder: Path) -> "Heads":
        """What `save` wrote."""
        try:
            with safe_open(folder / HEADS, "pt") as file:
                names = file.metadata()["names"].split("\n")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            heads = cls(tensors["weight"].shape[1], dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))
            heads.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as fault:
            raise UserError(f"{folder / HEADS}: not a reward model's heads ({fault})") from fault
        return heads


@dataclass(frozen=True)
class RewardModel:
    """Loaded, frozen, ready to score. `objectives` are the heads and the means of heads a recipe derives from them."""

    base: Base
    model: PreTrainedModel
    heads: Heads
    derived: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, base: Base, folder: Path, derived: Mapping[str, Sequence[str]]) -> "RewardModel":
        """The published adapter over a freshly loaded base, and its heads."""
        model = base.load()
        Mixer(model, {ADAPTER: peft_format.load(folder, whole=True)}, {ADAPTER: 1.0})
        return cls(base, model, Heads.load(folder).to(model.device), derived)

    @property
    def objectives(self) -> list[str]:
        """The columns of `score`."""
        return [*self.heads.names, *self.derived]

    @torch.inference_mode()
    def score(
        self, rows: Sequence[Answered], room: MemoryBudget, report: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """Points for answers to prompts, both as token ids: [n, objectives] float32 on the CPU."""
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        backbone = Backbone.of(self.model)
        points = torch.empty(len(rows), len(self.heads.names))
        todo = order

        def batch(count: int) -> int:
            picked = todo[:count]
            states = backbone.states([rows[i] for i in picked])
            points[picked] = self.heads.points(self.heads(torch.stack([of[-1] for of in states]))).cpu()
            return len(picked)

        while todo:
            todo = todo[room.attempt(batch) or 0 :]
            report(len(order) - len(todo))
        means = [points[:, [self.heads.names.index(head) for head in heads]].mean(1) for heads in self.derived.values()]
        return torch.cat([points, *(mean[:, None] for mean in means)], dim=1)

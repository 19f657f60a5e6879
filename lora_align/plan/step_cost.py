"""What a step takes, found without taking it: the step's own code runs on tensors that have a shape and no contents.

Two cuts of the base, of a few layers each, are enough: what a layer adds, every further layer adds again.
"""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation

from lora_align.model.base import inside
from lora_align.model.nf4 import DequantisedLinear4bit, Linear4bit

CUTS = (2, 4)  # layers
COLLECT_EVERY = 50  # operations
FLOAT = 4  # bytes
SCALES = (64, 256)  # weights that share one of NF4's scales, and scales that share one of theirs
Step = Callable[[PreTrainedModel], Tensor]  # a loss


@dataclass(frozen=True)
class Cost:
    """Bytes, and operations of one step: forward alone, and with its backward."""

    weights: float
    packed: float  # of these, what can be divided among cards
    trained: float
    activations: float  # at their highest, without what the vocabulary takes
    logits: float
    forward: float
    whole: float

    def on(self, other: "Cost", share: float) -> "Cost":
        """The cost at a share of the way from this one to another."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(a + share * (b - a) for a, b in pairs))


@dataclass(frozen=True)
class Shape:
    """A base as far as memory goes: its configuration, how its weights are kept, the adapter that is trained on it."""

    config: PretrainedConfig
    dtype: torch.dtype
    packed: bool  # in NF4
    dequantised: bool  # and, on a CPU, once more as they are computed with
    double_quant: bool
    lora: LoraConfig
    checkpointing: bool

    @property
    def layers(self) -> int:
        """Of the whole base."""
        return int(self.config.get_text_config().num_hidden_layers)

    def parameters(self) -> int:
        """Of the whole base, the adapter aside."""
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(self.config).parameters())

    def linears(self) -> int:
        """Count the weights of the layers that 4-bit quantisation covers: every linear one but the vocabulary's."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        head = model.get_output_embeddings()
        return sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear and m is not head)

    def cost(self, step: Step) -> Cost:
        """Of one forward and backward pass."""
        if self.layers <= CUTS[1]:
            return self._cost(self.layers, step)
        few, more = (self._cost(layers, step) for layers in CUTS)
        return few.on(more, (self.layers - CUTS[0]) / (CUTS[1] - CUTS[0]))

    def _cost(self, layers: int, step: Step) -> Cost:
        whole, narrow = (self._run(layers, step, vocabulary) for vocabulary in (True, False))
        return Cost(
            weights=whole.weights,
            packed=whole.packed,
            trained=whole.trained,
            activations=narrow.peak,
            logits=max(whole.peak - narrow.peak, 0),
            forward=whole.forward,
            whole=whole.operations,
        )

    def _run(self, layers: int, step: Step, vocabulary: bool) -> "_Found":
        model = self.outline(layers)
        every = COLLECT_EVERY if self.checkpointing else 0
        with FakeTensorMode(), _Ledger(every) as ledger:
            weights, packed, trained = self._filled(model)
            base = inside(model)
            head = base.get_output_embeddings()
            if not vocabulary:  # nobody looks at what is in it, so that targets beyond it do no harm
                head.weight = nn.Parameter(torch.empty(8, head.weight.shape[1], dtype=head.weight.dtype), False)
            began = ledger.highest = ledger.held
            with FlopCounterMode(display=False) as counted, torch.autocast("cpu", self.dtype, self._mixes):
                loss = step(base)
                forward = counted.get_total_flops()
                loss.backward()
            return _Found(weights, packed, trained, ledger.highest - began, forward, counted.get_total_flops())

    @property
    def _mixes(self) -> bool:
        return self.dtype == torch.bfloat16

    def outline(self, layers: int = CUTS[0]) -> Any:
        """On no device at all, as PEFT builds it."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.device("meta"), _quietly():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            _exchange(model, self.dtype, self.packed, self.dequantised)
            model.train().requires_grad_(False)
            if self.checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            lora = copy.deepcopy(self.lora)  # into which PEFT writes the names of this cut's layers
            return get_peft_model(model, lora, low_cpu_mem_usage=True)

    def _filled(self, model: nn.Module) -> tuple[float, float, float]:
        """Give every parameter a shape where it will lie; bytes of the frozen ones, of the 4-bit ones among them, and
        of those that are trained."""
        frozen = packed = trained = 0.0
        filled: dict[nn.Parameter, nn.Parameter] = {}  # the vocabulary's may be tied
        for module in model.modules():
            for name, given in module._parameters.items():
                if given is None:
                    continue
                if isinstance(module, Linear4bit) and name == "weight":
                    held = torch.empty(given.numel() // 2, dtype=torch.uint8)
                    frozen += self._scales(given.numel())
                    packed += held.nbytes
                    if isinstance(module, DequantisedLinear4bit):
                        module.dense = torch.empty(given.shape, dtype=self.dtype)
                        frozen += module.dense.nbytes
                else:
                    held = torch.empty(given.shape, dtype=torch.float32 if given.requires_grad else given.dtype)
                filled.setdefault(given, nn.Parameter(held, given.requires_grad))
                module._parameters[name] = filled[given]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                trained += parameter.untyped_storage().nbytes()
            else:
                frozen += parameter.untyped_storage().nbytes()
        return frozen, packed, trained

    def _scales(self, weights: int) -> float:
        scales = weights / SCALES[0]
        return scales + FLOAT * scales / SCALES[1] if self.double_quant else FLOAT * scales


@dataclass(frozen=True)
class _Found:
    weights: float
    packed: float
    trained: float
    peak: float
    forward: float
    operations: float


class _Ledger(TorchDispatchMode):
    """Bytes of all tensors that live, and the most there were."""

    def __init__(self, collect_every: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.highest = 0.0
        self.known: dict[int, int] = {}
        self.collect_every, self.operations = collect_every, 0

    def __enter__(self) -> "_Ledger":
        gc.freeze()  # what is there already need not be looked through each time
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        gc.unfreeze()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += 1
        if self.collect_every and not self.operations % self.collect_every:
            gc.collect()  # tensors without contents refer to each other where a layer is computed anew
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    self.held += storage.nbytes()
                    self.highest = max(self.highest, self.held)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return found

    def _gone(self, storage: int) -> None:
        self.held -= self.known.pop(storage, 0)


class _Packed(Linear4bit):
    """A 4-bit layer by what it takes: its weight unpacked, used, and let go, forwards and backwards."""

    def forward(self, x: Tensor) -> Tensor:
        given, weight = x.to(self.compute_dtype), self._parameters["weight"]
        found = _Unpacked.apply(given, weight, self.out_features)  # type: ignore[no-untyped-call]
        found = found if self.bias is None else found + self.bias
        return found.to(x.dtype)  # type: ignore[no-any-return]


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed)
        ctx.shape = (rows, x.shape[-1])
        return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return upstream @ upstream.new_empty(ctx.shape), None, None


class _Silu(nn.Module):
    """In one piece, as devices have it; torch would take its backward apart."""

    def forward(self, x: Tensor) -> Tensor:
        return _OnePiece.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _OnePiece(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return torch.empty_like(ctx.saved_tensors[0])


def _exchange(model: PreTrainedModel, dtype: torch.dtype, packed: bool, dequantised: bool) -> None:
    """Layers for those that take what they do; in 4-bit all linear ones but the vocabulary's."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.SiLU | SiLUActivation):
                setattr(module, name, _Silu())
            if packed and type(layer) is nn.Linear and layer is not head:
                bias = layer.bias is not None
                wide, high = layer.in_features, layer.out_features
                kind = DequantisedLinear4bit if dequantised else _Packed
                small = kind(wide, high, bias, dtype, quant_type="nf4", device="meta")
                setattr(module, name, small)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Some say once more what they said when the base was loaded."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The memory and operations of one training step, computed on tensors without data.

The step's own code runs on fake tensors, which have a shape and no data. It runs on bases with few layers; the cost of
the whole base is extrapolated, as if every further layer cost the same as the third.
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
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation

from lora_align.model.base import base_model_of
from lora_align.model.nf4 import DequantisedLinear4bit, Linear4bit, quantised_layers

CUTS = (2, 3)  # layers of the short bases; with one layer, activations of a whole layer would be counted wrongly
COLLECT_EVERY = 50  # operations between two garbage collections
FLOAT = 4  # bytes
SCALES = (64, 256)  # NF4 block sizes: weights per scale, and scales per scale of scales
Step = Callable[[PreTrainedModel], Tensor]  # returns a loss


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one step."""

    weights: float
    packed: float  # the 4-bit part of the weights, which can be sharded
    trained: float
    activations: float  # peak without logits
    logits: float
    forward: float  # operations of the forward pass
    whole: float  # operations of forward and backward


@dataclass(frozen=True)
class Shape:
    """Everything about a base that determines a step's memory: configuration, storage of weights, adapter."""

    config: PretrainedConfig
    dtype: torch.dtype
    packed: bool  # weights are stored in NF4
    dequantised: bool  # and also stored dequantised, on a CPU
    double_quant: bool
    lora: LoraConfig
    checkpointing: bool

    @property
    def layers(self) -> int:
        """Return the number of layers of the whole base."""
        return int(self.config.get_text_config().num_hidden_layers)

    def parameters(self) -> int:
        """Count the parameters of the whole base, without the adapter."""
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(self.config).parameters())

    def linears(self) -> int:
        """Count the weights that 4-bit quantisation covers: of every linear layer except the output head."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        return sum(layer.get_parameter("weight").numel() for layer in quantised_layers(model).values())

    def cost(self, step: Step) -> Cost:
        """Return the cost of one forward and backward pass."""
        few = min(self.layers, CUTS[0])
        whole, narrow = (self._run(few, step, vocabulary) for vocabulary in (True, False))
        more = self._run(CUTS[1], step, False) if self.layers > few else narrow
        between = max(CUTS[1] - few, 1)
        each = {name: (value - getattr(narrow, name)) / between for name, value in vars(more).items()}  # of one layer
        total = {name: value + (self.layers - few) * each[name] for name, value in vars(whole).items()}
        return Cost(
            weights=total["weights"],
            packed=total["packed"],
            trained=total["trained"],
            activations=narrow.peak + (self.layers - few) * each["peak"],
            logits=max(whole.peak - narrow.peak, 0),
            forward=total["forward"],
            whole=total["operations"],
        )

    def _run(self, layers: int, step: Step, vocabulary: bool) -> "_RunCost":
        model = self.outline(layers)
        every = COLLECT_EVERY if self.checkpointing else 0
        with FakeTensorMode(), _Ledger(every) as ledger:
            weights, packed, trained = self._materialise(model)
            base = base_model_of(model)
            head = base.get_output_embeddings()
            if not vocabulary:  # a tiny head; targets outside its vocabulary are harmless, as fake tensors have no data
                head.weight = nn.Parameter(torch.empty(8, head.weight.shape[1], dtype=head.weight.dtype), False)
            began = ledger.highest = ledger.live_bytes
            with torch.autocast("cpu", self.dtype, self._autocasts):
                loss = step(base)
                forward = ledger.flops
                loss.backward()
            return _RunCost(weights, packed, trained, ledger.highest - began, forward, ledger.flops)

    @property
    def _autocasts(self) -> bool:
        return self.dtype == torch.bfloat16

    def outline(self, layers: int = CUTS[0]) -> Any:
        """Build the PEFT model with this number of layers on the meta device."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.device("meta"), _no_warnings():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            _replace_layers(model, self.dtype, self.packed, self.dequantised)
            model.train().requires_grad_(False)
            if self.checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            lora = copy.deepcopy(self.lora)  # PEFT writes layer names into it
            return get_peft_model(model, lora, low_cpu_mem_usage=True)

    def _materialise(self, model: nn.Module) -> tuple[float, float, float]:
        """Replace meta parameters by fake ones. Return the bytes of the frozen, the 4-bit and the trained ones."""
        frozen = packed = trained = 0.0
        filled: dict[nn.Parameter, nn.Parameter] = {}  # embeddings and output head may be tied
        for module in model.modules():
            for name, meta in module._parameters.items():
                if meta is None:
                    continue
                if isinstance(module, Linear4bit) and name == "weight":
                    fake = torch.empty(meta.numel() // 2, dtype=torch.uint8)
                    frozen += self._scales(meta.numel())
                    packed += fake.nbytes
                    if isinstance(module, DequantisedLinear4bit):
                        module.dense = torch.empty(meta.shape, dtype=self.dtype)
                        frozen += module.dense.nbytes
                else:
                    fake = torch.empty(meta.shape, dtype=torch.float32 if meta.requires_grad else meta.dtype)
                filled.setdefault(meta, nn.Parameter(fake, meta.requires_grad))
                module._parameters[name] = filled[meta]
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
class _RunCost:
    weights: float
    packed: float
    trained: float
    peak: float
    forward: float
    operations: float


class _Ledger(TorchDispatchMode):
    """Count the bytes of all live tensors, their peak, and the floating-point operations."""

    def __init__(self, collect_every: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.highest = self.flops = 0.0
        self.known: dict[int, int] = {}
        self.collect_every, self.operations = collect_every, 0

    def __enter__(self) -> "_Ledger":
        gc.freeze()  # collections need not scan objects that exist already
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        gc.unfreeze()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.prim.device.default:  # two thirds of all calls
            return args[0].fake_device
        self.operations += 1
        if self.collect_every and not self.operations % self.collect_every:
            gc.collect()  # with checkpointing, fake tensors form reference cycles
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    self.live_bytes += storage.nbytes()
                    self.highest = max(self.highest, self.live_bytes)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, storage: int) -> None:
        self.live_bytes -= self.known.pop(storage, 0)


class _Packed(Linear4bit):
    """A stand-in for a 4-bit layer that takes the same memory: it unpacks, uses and frees its weight in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        inputs, weight = x.to(self.compute_dtype), self._parameters["weight"]
        output = _Unpacked.apply(inputs, weight, self.out_features)  # type: ignore[no-untyped-call]
        output = output if self.bias is None else output + self.bias
        return output.to(x.dtype)  # type: ignore[no-any-return]


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
    """SiLU as one operation, as on a real device. On fake tensors, torch would split its backward pass into several."""

    def forward(self, x: Tensor) -> Tensor:
        return _SiluFunction.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _SiluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return torch.empty_like(ctx.saved_tensors[0])


def _replace_layers(model: PreTrainedModel, dtype: torch.dtype, packed: bool, dequantised: bool) -> None:
    """Replace SiLU, and in 4-bit every linear layer except the output head, by stand-ins that take the same memory."""
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
def _no_warnings() -> Iterator[None]:
    """Hide warnings that already appeared when the base was loaded."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

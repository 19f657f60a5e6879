"""The weights of a base as its folder stores them, read one tensor at a time."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_align.adapters.safetensors_stream import DTYPES, TensorFile
from lora_align.errors import UserError
from lora_align.model.base import Base, comes_quantized
from lora_align.model.base_folder import weight_files
from lora_align.model.nf4 import quantised_layers


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a base, and its layers without their weights."""

    base: Base
    files: tuple[TensorFile, ...]
    outline: PreTrainedModel  # on the meta device

    @classmethod
    def of(cls, base: Base) -> "Checkpoint":
        """Open the weights of a base. Refuse a base that is stored in 4-bit."""
        if comes_quantized(base.folder):
            raise UserError(
                f"base.model {base.recipe.model!r} has quantised weights only; set base.model to the checkpoint that "
                "they were made from"
            )
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
        files = tuple(map(TensorFile, weight_files(base.folder)))
        shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
        for name, entry in (item for file in files for item in file.entries.items()):
            if entry.dtype not in DTYPES:
                raise UserError(f"{base.folder}: {name} has the type {entry.dtype}; known: {', '.join(DTYPES)}")
            stated = shapes.get(name, shapes.get(f"{outline.base_model_prefix}.{name}", entry.shape))
            if entry.shape != stated:
                raise UserError(f"{base.folder}: {name} is {entry.shape}, but config.json says {stated}")
        return cls(base, files, outline)

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Return the names of the tensors that the recipe quantises to NF4."""
        layers = quantised_layers(self.outline) if self.base.recipe.quantization == "nf4" else ()
        return frozenset(map(self.tensor, layers))

    def tensor(self, module: str) -> str:
        """Return the name of a module's weight in the files, which may lack the prefix of the whole model."""
        name = f"{module}.weight"
        try:
            layer = self.outline.get_submodule(module)
        except AttributeError as fault:
            raise UserError(f"{module} cannot be merged: {self.outline.config.model_type} has no such layer") from fault
        if layer is self.outline.get_output_embeddings() and self.outline.config.tie_word_embeddings:
            raise UserError(f"{module} cannot be merged: its weight is that of the embeddings")
        for candidate in (name, name.removeprefix(f"{self.outline.base_model_prefix}.")):
            if any(candidate in file.entries for file in self.files):
                return candidate
        raise UserError(f"{module} cannot be merged: {self.base.folder} has no tensor {name}")

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Return the names of the tensors that are stored as [in, out]."""
        layers = self.outline.named_modules()
        return frozenset(self.tensor(name) for name, layer in layers if isinstance(layer, Conv1D))

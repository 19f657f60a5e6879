"""Write LoRA updates as a GGUF file, which llama.cpp loads beside its base."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from gguf.constants import GGMLQuantizationType, GGUFType, Keys, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig

from lora_align.adapters.delta import Factors, is_finite
from lora_align.errors import UserError
from lora_align.model.base_folder import GGUF, hub_id

ARCHITECTURES = {  # transformers' model_type → llama.cpp's architecture
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
INTERLEAVED = ("llama", "mistral")  # llama.cpp rotates neighbouring rows of q and k; transformers rotates halves
DTYPES = {  # --dtype → the type of the tensors, and the file's
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # values that share a scale in Q8_0


@dataclass(frozen=True)
class Layout:
    """The names and the order of rows that llama.cpp gives the weights of a base."""

    architecture: gguf.MODEL_ARCH
    names: gguf.TensorNameMap
    heads: Mapping[str, int]  # module kind → heads whose rows are reordered
    tied: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Layout":
        """Return the layout of a base. Refuse an architecture whose layout is unknown."""
        if config.model_type not in ARCHITECTURES:
            raise UserError(
                f"an adapter of a {config.model_type!r} base cannot be written as GGUF (known: "
                f"{', '.join(ARCHITECTURES)}); llama.cpp's convert_lora_to_gguf.py takes the folder of a mix instead"
            )
        architecture = ARCHITECTURES[config.model_type]
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        return cls(architecture, names, heads if config.model_type in INTERLEAVED else {}, config.tie_word_embeddings)

    def name(self, module: str) -> str:
        """Return llama.cpp's name of a module's weight."""
        name = self.names.get_name(module)
        if name is None or (module.endswith("lm_head") and self.tied):
            why = "its weight is that of the embeddings" if name else "llama.cpp has no such weight"
            raise UserError(f"{module} cannot be exported to GGUF: {why}; train without it (lora.targets)")
        return f"{name}.weight"

    def reorder(self, module: str, B: Tensor) -> Tensor:
        """Return B [out, r] with its rows in llama.cpp's order."""
        heads = self.heads.get(module.rpartition(".")[2])
        if heads is None:
            return B
        halves = B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1])
        return halves.transpose(1, 2).reshape(B.shape)


@dataclass(frozen=True)
class About:
    """Describe an adapter and its base, as a GGUF file states them."""

    name: str
    description: str
    base: str  # a hub id, a file or a folder
    fingerprint: str


def write(file: Path, modules: Iterable[tuple[str, Factors]], layout: Layout, about: About, dtype: str) -> None:
    """Write an adapter. Its scaling is part of B, and alpha is 0, so llama.cpp applies none of its own."""
    of_tensors, of_file = DTYPES[dtype]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout.architecture])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(about.name)
    writer.add_description(about.description)
    writer.add_file_type(of_file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_base(writer, about)
    for module, factors in modules:
        name = layout.name(module)
        if dtype == "q8_0":
            if factors.A.shape[1] % BLOCK:
                raise UserError(
                    f"{module}: q8_0 needs an input width that is a multiple of {BLOCK}, not {factors.A.shape[1]}; "
                    "give --dtype float16"
                )
            factors = factors.padded(-(-factors.rank // BLOCK) * BLOCK)
        if dtype != "float32":
            factors = factors.balanced()
        for suffix, side in (("lora_a", factors.A), ("lora_b", layout.reorder(module, factors.B))):
            if not is_finite(side if dtype == "float32" else side.half()):  # Q8_0 stores its scales in float16
                raise UserError(f"{module}: a value is too large for {dtype}; give smaller weights or --dtype float32")
            stored = gguf.quantize(side.to(torch.float32).contiguous().numpy(), of_tensors)
            writer.add_tensor(f"{name}.{suffix}", stored, raw_dtype=of_tensors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_base(writer: gguf.GGUFWriter, about: About) -> None:
    writer.add_base_model_count(1)
    repository = hub_id(about.base)
    owner, _, name = repository.partition("/")
    writer.add_base_model_name(0, name or Path(about.base).name.removesuffix(GGUF))
    writer.add_base_model_description(0, f"sha256 of its weights: {about.fingerprint}")
    if repository:
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{repository}")

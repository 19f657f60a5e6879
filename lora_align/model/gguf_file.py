"""GGUF files as bases: convert a file, once, to a folder that transformers loads."""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_align import store
from lora_align.console import count
from lora_align.errors import UserError, first_line

FLOAT32_UP_TO = 1 << 30  # weights; a larger base is stored in bfloat16, to halve memory and disk
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")  # the ends of a text, of a turn and of a message
CHECKED = {  # keys that transformers does not read, and the attribute of its configuration that must have their value
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and newer: a divisor for each rotary frequency
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PROBE = "In 1234, I'm  glad:\n\n\tna\u00efve \u4f60\u597d <|x|>"
INSTEAD = "use the base as a folder or a hub id instead"  # a remedy
FAULTS = (ValueError, KeyError, IndexError, AttributeError, TypeError, OSError, RuntimeError, struct.error)


def folder_of(file: Path, digest: str) -> Path:
    """Return the cache folder with a file's base as safetensors, configuration and tokenizer. Fill it on first use.

    `digest` is the file's sha256. Quantised weights are stored as the numbers that they stand for.
    """
    name = f"{file.stem}-{digest[:16]}-{version('transformers')}-{version('gguf')}"
    folder = store.cache_folder() / "bases" / name
    store.fill_once(folder, "the base of the GGUF file", lambda staging: _convert(file, staging))
    return folder


def _convert(file: Path, staging: Path) -> None:
    with _report_faults(file):
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_parts(file, metadata)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    factors = [torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    sizes.pop(ROPE_FACTORS, None)
    dtype = torch.float32 if sum(sizes.values()) <= FLOAT32_UP_TO else torch.bfloat16
    store.check_free_space(staging.parent, sum(sizes.values()) * dtype.itemsize, store.CACHE_REMEDY)
    with TemporaryDirectory() as alone, _report_faults(file):  # away from other files that transformers would read
        (Path(alone) / file.name).symlink_to(file.resolve())
        # AutoTokenizer would choose a class by architecture, which may add tokens of its own
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=file.name)
        model, loaded = _loaded(Path(alone), file.name, dtype)
    _check_weights(file, model, loaded, sizes)
    with _report_faults(file):
        _check_config(file, model.config, metadata)
        _set_rope(file, model.config, metadata, factors)
    # save_pretrained refuses a model that it believes quantised
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    stops = [metadata[key] for name in STOPS if (key := f"tokenizer.ggml.{name}") in metadata]
    model.generation_config = GenerationConfig(eos_token_id=stops)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if AutoTokenizer.from_pretrained(staging)(PROBE) != tokenizer(PROBE):
        raise UserError(f"{file}: transformers does not rebuild the same tokenizer; use the base's folder instead")


def _loaded(folder: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return the dequantised model, and which weights transformers did not find."""
    with redirect_stderr(StringIO()):  # hides transformers' progress bar
        result: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, output_loading_info=True
        )
    return result[0], result[1]


def _refuse_parts(file: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a part of a model, and a file of another type."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{file}: a GGUF file of type {kind!r}, not a model")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UserError(f"{file}: one of {parts} parts; join them with `llama-gguf-split --merge`")


def _check_weights(file: Path, model: PreTrainedModel, loaded: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Refuse a file if transformers left weights of the model random, or weights of the file unused."""
    if missing := sorted(loaded["missing_keys"]):
        lost = count(len(missing), "weight")
        raise UserError(f"{file}: transformers finds no {missing[0]} in the file ({lost} missing); {INSTEAD}")
    stored, read = sum(sizes.values()), sum(weight.numel() for weight in model.parameters())
    if stored != read:
        raise UserError(f"{file}: the file has {stored:,} weights, of which transformers reads {read:,}; {INSTEAD}")


def _check_config(file: Path, config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    """Refuse a file if transformers would compute with another value than the file states."""
    for key, attribute in CHECKED.items():
        stated = metadata.get(f"{metadata['general.architecture']}.{key}")
        used = getattr(config, attribute, None)
        if stated is not None and used is not None and abs(stated - used) > 1e-6 * abs(stated):
            raise UserError(f"{file}: {key} is {stated:g}, but transformers would use {used:g}; {INSTEAD}")


def _set_rope(file: Path, config: PreTrainedConfig, metadata: Mapping[str, Any], factors: list[torch.Tensor]) -> None:
    """Set Llama 3's rotary scaling, which transformers does not read. Refuse other kinds."""
    scaling = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if scaling != "none" and config.rope_parameters.get("rope_type", "default") == "default":
        raise UserError(f"{file}: transformers does not read its rotary scaling ({scaling}); {INSTEAD}")
    if factors:
        plain, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, 1.0), torch.device("cpu"))
        config.rope_parameters = _with_rope(config, float(factors[0].max())).rope_parameters
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if not torch.allclose(plain / factors[0], scaled, rtol=1e-4):
            raise UserError(f"{file}: its rotary factors are not those of Llama 3; {INSTEAD}")


def _with_rope(config: PreTrainedConfig, factor: float) -> PreTrainedConfig:
    copy = type(config).from_dict(config.to_dict())
    copy.rope_parameters = {**config.rope_parameters, "rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    return copy


@contextmanager
def _report_faults(file: Path) -> Iterator[None]:
    try:
        yield
    except FAULTS as fault:
        raise UserError(f"{file}: transformers cannot read this GGUF file: {first_line(fault)}; {INSTEAD}") from fault

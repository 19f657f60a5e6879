"""Compute log-probabilities in llama.cpp, and with dense weights to compare them with."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_align.adapters.delta import LoraDelta
from lora_align.model.base import Base

TEXT = "The best way to learn cooking is to begin with a simple meal"
SCRIPT = Path(__file__).parent / "export" / "logprobs.mjs"
Adapters = Mapping[Path, float]  # adapter file → scale


def dense_logprobs(
    base: Base, vectors: Sequence[LoraDelta], settings: Sequence[Sequence[float]], ids: list[int]
) -> list[Tensor]:
    """Return the log-probabilities after each token, for each setting of the vectors' weights.

    The model is in float32; updates are summed in float64.
    """
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    layers = {name: layer for name, layer in model.named_modules() if any(name in vector for vector in vectors)}
    plain = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    results = []
    for weights in settings:
        for name, layer in layers.items():
            update = sum(
                weight * (vector[name].B.double() @ vector[name].A.double())
                for weight, vector in zip(weights, vectors, strict=True)
                if weight and name in vector
            )
            layer.weight.data = (plain[name] + update).float()
        with torch.no_grad():
            results.append(model(torch.tensor([ids])).logits[0].log_softmax(-1))
    return results


def llama_cpp_logprobs(
    library: Path, model: Path, settings: Sequence[Adapters], ids: list[int], out: Path
) -> list[Tensor]:
    """Return llama.cpp's log-probabilities after each token, for each setting of scaled adapters."""
    loras = [[{"filePath": str(file), "scale": scale} for file, scale in one.items()] for one in settings]
    words = ["node", str(SCRIPT), str(model), json.dumps(loras), json.dumps(ids), str(out)]
    subprocess.run(words, cwd=library, check=True, timeout=300)
    return list(torch.from_numpy(np.fromfile(out, dtype=np.float32)).view(len(settings), len(ids), -1))


def distance(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute difference of two log-probabilities of the next token, weighted by the first's."""
    return float((one.exp() * (one - other.clamp_min(-30)).abs()).sum(-1).mean())


def float32_gguf(file: Path, out: Path) -> Path:
    """Write a GGUF file again with dequantised weights."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out

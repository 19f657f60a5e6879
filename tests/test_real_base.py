"""The spine on SmolLM2-135M-Instruct, read from the GGUF file that LORA_ALIGN_REAL_BASE names; skipped without it."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_align import recipe
from lora_align.adapters.delta import LoraDelta
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.packing import Backbone
from lora_align.policy.vectors import find
from support import call, made_once

WHY = "\n\nThis is a long explanation of the matter, with reasons, caveats and a closing remark."
QUESTIONS = ["What is rain?", "Name a fruit.", "Is ice cold?", "What is tea?"]
QUESTIONS += ["Where is Rome?", "Who bakes bread?", "What do cats eat?", "How many days has a week?"]
ANSWERS = ["Water.", "Apple.", "Yes.", "A drink.", "In Italy.", "A baker.", "Meat.", "Seven."]
RECIPE = """
[base]
model = "{base}"
[preferences.brief]
data = "pairs.jsonl"
[dpo]
learning_rate = 3e-4
batch_size = 2
held_out = 0
warmup = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a preference was trained on eight pairs."""
    base = os.environ.get("LORA_ALIGN_REAL_BASE")
    if not base:
        pytest.skip("LORA_ALIGN_REAL_BASE is not set (tests/fetch_real_base.py fetches the file)")

    def make(folder: Path) -> None:
        pairs = [
            {"prompt": question, "chosen": answer, "rejected": answer + WHY}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        (folder / "lora-align.toml").write_text(RECIPE.format(base=base))
        done = call(folder, "dpo", "--pref", "brief")
        assert done.code == 0, done.err

    return made_once(tmp_path_factory, "real", make)


def test_merged_vector_changes_the_answers(folder: Path) -> None:
    merged = call(folder, "merge", "--weights", "brief=1")
    assert merged.code == 0, merged.err
    script = "/w brief=0\nWhat is the capital of France?\n" + "".join(f"/w brief={w}\n/retry\n" for w in (1, -1))
    done = call(folder, "chat", "--temperature", "0", "--max-new-tokens", "32", stdin=script)
    assert done.code == 0, done.err
    plain, brief, long = done.out.strip().splitlines()
    assert "Paris" in plain
    assert len({plain, brief, long}) == 3


def test_both_directions_learned_their_pairs(folder: Path) -> None:
    """Stock PEFT, on the same 4-bit base, prefers what each adapter was trained towards."""
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"]))
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    prompt = [Message("user", pair["prompt"])]
    rows = [base.chat.answered(prompt, [pair["chosen"], pair["rejected"]])]
    model = base.load()
    before = answer_logprobs(model, rows, MemoryBudget(4096))
    for direction, sign in (("pos", 1), ("neg", -1)):
        policy = PeftModel.from_pretrained(model, folder / "runs" / "dpo" / "brief" / direction)
        chosen, rejected = (answer_logprobs(policy, rows, MemoryBudget(4096)) - before).tolist()
        assert sign * (chosen - rejected) > 5, direction
        policy.unload()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_are_packed_in_float32(folder: Path, quantization: str) -> None:
    settings = recipe.load(folder / "lora-align.toml", [f'base.quantization="{quantization}"', 'base.dtype="float32"'])
    assert Backbone.of(bases.find(settings.base).load()).longest, "its states are up to 55, and differ by 0.002"


def test_llama_cpp_computes_the_exported_vectors(folder: Path, tmp_path: Path) -> None:
    """Compare llama.cpp's log-probabilities with those of dense float32 weights, on the dequantised base."""
    library = os.environ.get("LORA_ALIGN_LLAMA_CPP")
    if not library:
        pytest.skip("LORA_ALIGN_LLAMA_CPP is not set (.ci/run installs llama.cpp with npm)")
    for out, options in (("each", ["--each"]), ("mix.gguf", [])):
        words = ["brief=0.5,dpo/brief/pos=1", "--gguf", str(tmp_path / out), "--dtype", "float32"]
        done = call(folder, "export", *words, *options)
        assert done.code == 0, done.err
    brief, pos, mix = (str(tmp_path / name) for name in ("each/brief.gguf", "each/dpo-brief-pos.gguf", "mix.gguf"))
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"], quantization="none"))
    ids = base.chat.tokenizer("The best way to learn cooking is to begin with a simple meal").input_ids
    vectors = [find(name, folder / "runs", ["brief"]).load() for name in ("brief", "dpo/brief/pos")]
    dense = {
        weights: dense_logprobs(base, vectors, weights, ids)
        for weights in ((0.0, 0.0), (0.5, 1.0), (0.5, 0.0), (1.0, 0.0), (-1.0, 0.0))
    }
    float32 = float32_gguf(Path(os.environ["LORA_ALIGN_REAL_BASE"]), tmp_path / "base.gguf")

    def error(weights: tuple[float, float], *adapters: tuple[str, float]) -> float:
        found = llama_cpp_logprobs(Path(library), float32, adapters, ids, tmp_path / "out.f32")
        return distance(dense[weights], found)

    assert error((0.0, 0.0)) < 0.003
    for weight in (-1.0, 0.5, 1.0):
        assert error((weight, 0.0), (brief, weight)) < 0.003
        assert distance(dense[weight, 0.0], dense[0.0, 0.0]) > 0.02
    assert error((0.5, 1.0), (mix, 1.0)) < 0.003
    assert error((0.5, 1.0), (brief, 0.5), (pos, 1.0)) < 0.003


def test_modelfile_names_the_base_and_an_adapter(folder: Path, tmp_path: Path) -> None:
    done = call(folder, "export", "brief=1", "--ollama", str(tmp_path / "out"))
    assert done.code == 0, done.err
    base, adapter, template, *_ = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert base == f"FROM {Path(os.environ['LORA_ALIGN_REAL_BASE']).resolve()}"
    assert adapter == "ADAPTER ./mix.gguf"
    assert template.startswith('TEMPLATE """{{- $before')
    modelfile = (tmp_path / "out/Modelfile").read_text()
    assert '{{- else }}{{ "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM' in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert (tmp_path / "out/mix.gguf").is_file()
    assert "Licence: `apache-2.0`" in (tmp_path / "out/README.md").read_text()


def test_merged_model_answers_as_the_mix(folder: Path, tmp_path: Path) -> None:
    out, options = str(tmp_path / "out"), ["--dtype", "float32", "--set", 'base.quantization="none"', "--json"]
    done = call(folder, "export", "brief=1", "--merged", out, *options)
    assert done.code == 0, done.err
    assert abs(json.loads(done.out)["figures"]["KL(mix‖merged), nats per token"]) < 1e-5


def distance(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute difference of two log-probabilities of the next token, weighted by the first's."""
    return float((one.exp() * (one - other.clamp_min(-30)).abs()).sum(-1).mean())


def dense_logprobs(base: Base, vectors: list[LoraDelta], weights: tuple[float, ...], ids: list[int]) -> Tensor:
    """Return the log-probabilities after each token, from float32 weights to which the vectors are added."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        for vector, weight in zip(vectors, weights, strict=True):
            if name in vector:
                layer.weight.data += (weight * (vector[name].B.double() @ vector[name].A.double())).float()
    with torch.no_grad():
        logprobs: Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


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


def llama_cpp_logprobs(
    library: Path, model: Path, adapters: Iterable[tuple[str, float]], ids: list[int], out: Path
) -> Tensor:
    """Return llama.cpp's log-probabilities after each token, with scaled adapters."""
    scales = json.dumps([{"filePath": file, "scale": scale} for file, scale in adapters])
    script = Path(__file__).parent / "export" / "logprobs.mjs"
    words = ["node", str(script), str(model), scales, json.dumps(ids), str(out)]
    subprocess.run(words, cwd=library, check=True, timeout=120)
    return torch.from_numpy(np.fromfile(out, dtype=np.float32)).view(len(ids), -1)

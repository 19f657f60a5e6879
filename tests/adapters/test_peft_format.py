"""What PEFT writes we read as PEFT means it; what we write stock PEFT loads, in a process without us."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_align.adapters import merge, peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.errors import UserError


def peft_adapter(base: Path, folder: Path, seed: int, **config: Any) -> dict[str, torch.Tensor]:
    """Let PEFT make and save an adapter; returns its own idea of every ΔW."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    meant = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            meant[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    model.save_pretrained(str(folder))
    return meant


KINDS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_what_peft_means(kind: str, llama: Path, tmp_path: Path) -> None:
    meant = peft_adapter(llama, tmp_path, 0, **KINDS[kind])
    read = peft_format.load(tmp_path)
    assert set(read) == set(meant)
    for name, factors in read.items():
        assert torch.allclose(factors.B @ factors.A, meant[name], atol=1e-6)


STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
loaded = {n: p for n, p in model.named_parameters() if "lora_" in n}
assert loaded and all(p.abs().sum() > 0 for p in loaded.values())
with torch.no_grad():
    torch.save(model(torch.arange(40).view(2, 20)).logits, out)
assert "lora_align" not in sys.modules
"""


@pytest.mark.parametrize("rank", [None, 5])
def test_a_mix_of_unlike_adapters_in_stock_peft_equals_the_dense_sum(
    rank: int | None, llama: Path, tmp_path: Path
) -> None:
    weights = {"plain": 1.0, "rslora": -0.5, "patterns": 0.75}
    meant = {kind: peft_adapter(llama, tmp_path / kind, i, **KINDS[kind]) for i, kind in enumerate(KINDS)}
    vectors = {kind: peft_format.load(tmp_path / kind) for kind in KINDS}
    merged = merge.exact(vectors, weights, rank)
    peft_format.save(merged.delta, tmp_path / "mix", base=str(llama))

    dense = AutoModelForCausalLM.from_pretrained(llama)
    layers = dict(dense.named_modules())
    for kind, weight in weights.items():
        for name, matrix in meant[kind].items():
            if rank is None:
                layers[name].weight.data += weight * matrix
    if rank is not None:
        for name, layer in layers.items():
            parts = [weight * meant[kind][name] for kind, weight in weights.items() if name in meant[kind]]
            if parts:
                U, S, Vt = torch.linalg.svd(sum(parts).double(), full_matrices=False)  # type: ignore[union-attr]
                layer.weight.data += ((U[:, :rank] * S[:rank]) @ Vt[:rank]).float()
        assert 0 < merged.left_out < 1
    with torch.no_grad():
        expected = dense(torch.arange(40).view(2, 20)).logits

    words = [sys.executable, "-c", STOCK, str(llama), str(tmp_path / "mix"), str(tmp_path / "logits.pt")]
    subprocess.run(words, check=True, timeout=120)
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < 1e-4


def test_half_precision_adapters_are_scaled_in_full(llama: Path, tmp_path: Path) -> None:
    peft_adapter(llama, tmp_path, 0, **{**KINDS["plain"], "lora_alpha": 7})
    file = tmp_path / peft_format.WEIGHTS
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    for name, factors in peft_format.load(tmp_path).items():
        B, A = (stored[f"{peft_format.PREFIX}{name}.lora_{side}.weight"].double() for side in "BA")
        assert torch.allclose(factors.B.double() @ factors.A.double(), B @ A * 7 / 4, atol=1e-6)


def test_written_and_read_again_is_the_same(llama: Path, tmp_path: Path) -> None:
    peft_adapter(llama, tmp_path / "a", 0, **KINDS["patterns"])
    delta = peft_format.load(tmp_path / "a")
    peft_format.save(delta, tmp_path / "b", base=str(llama))
    again = peft_format.load(tmp_path / "b")
    assert all(torch.equal(again[n].A, f.A) and torch.equal(again[n].B, f.B) for n, f in delta.items())


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    peft_adapter(llama, tmp_path, 0, **KINDS["plain"])
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("auto_mapping", {"base_model_class": "x"}, "code"),
        ("target_parameters", ["x"], "target_parameters"),
        ("layer_replication", [[0, 1]], "replicated"),
        ("brand_new_option", 1, "unknown key 'brand_new_option'"),
        ("r", 5, "the rank is 5"),
        ("peft_type", "LOHA", "not a LoRA adapter"),
    ],
)
def test_adapters_that_mean_more_than_a_product_are_refused(folder: Path, key: str, value: object, told: str) -> None:
    file = folder / peft_format.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=told):
        peft_format.load(folder)


def _spoil(tensors: dict[str, torch.Tensor], fault: str) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    if fault == "nan":
        tensors[first][0, 0] = float("nan")
    elif fault == "missing":
        del tensors[first]
    elif fault == "extra":
        tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    elif fault == "empty":
        tensors = {}
    return tensors


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan", "not finite"),
        ("missing", "not the other side"),
        ("extra", "not a LoRA tensor"),
        ("empty", "no LoRA tensors"),
    ],
)
def test_spoilt_tensors_are_refused(folder: Path, fault: str, told: str) -> None:
    file = folder / peft_format.WEIGHTS
    save_file(_spoil(load_file(file), fault), file)
    with pytest.raises(UserError, match=told):
        peft_format.load(folder)


def test_cut_files_and_pickles_are_refused(folder: Path) -> None:
    file = folder / peft_format.WEIGHTS
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or cut short"):
            peft_format.load(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        peft_format.load(folder)


def test_shared_target_lists_are_handed_on(folder: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    peft_adapter(llama, other, 1, **KINDS["rslora"])
    assert peft_format.common_endings([folder, folder]) == ["down_proj", "q_proj"]
    assert peft_format.common_endings([folder, other]) is None
    assert isinstance(peft_format.load(folder), LoraDelta)

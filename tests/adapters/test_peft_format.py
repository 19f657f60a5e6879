"""PEFT's adapters are read as PEFT reads them, and stock PEFT loads ours in a separate process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.streamed_merge import Merge, Tally
from lora_align.errors import UserError
from support import peft_adapter

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
def test_loaded_delta_equals_that_of_peft(kind: str, llama: Path, tmp_path: Path) -> None:
    expected = peft_adapter(llama, tmp_path, 0, **KINDS[kind])
    read = peft_format.load(tmp_path)
    assert set(read) == set(expected)
    for name, factors in read.items():
        assert torch.allclose(factors.B @ factors.A, expected[name], atol=1e-6)


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
def test_mix_in_stock_peft_equals_the_dense_sum(rank: int | None, llama: Path, tmp_path: Path) -> None:
    weights = {"plain": 1.0, "rslora": -0.5, "patterns": 0.75}
    expected = {kind: peft_adapter(llama, tmp_path / kind, i, **KINDS[kind]) for i, kind in enumerate(KINDS)}
    vectors = {kind: peft_format.load(tmp_path / kind) for kind in KINDS}
    job, tally = Merge(vectors, weights), Tally()
    peft_format.save(tmp_path / "mix", tally.counted(job.modules(rank)), job.names(), BaseInfo(str(llama)))

    dense = AutoModelForCausalLM.from_pretrained(llama)
    layers = dict(dense.named_modules())
    for kind, weight in weights.items():
        for name, matrix in expected[kind].items():
            if rank is None:
                layers[name].weight.data += weight * matrix
    if rank is not None:
        for name, layer in layers.items():
            parts = [weight * expected[kind][name] for kind, weight in weights.items() if name in expected[kind]]
            if parts:
                U, S, Vt = torch.linalg.svd(sum(parts).double(), full_matrices=False)  # type: ignore[union-attr]
                layer.weight.data += ((U[:, :rank] * S[:rank]) @ Vt[:rank]).float()
        assert 0 < tally.left_out < 1
    with torch.no_grad():
        logits = dense(torch.arange(40).view(2, 20)).logits

    words = [sys.executable, "-c", STOCK, str(llama), str(tmp_path / "mix"), str(tmp_path / "logits.pt")]
    subprocess.run(words, check=True, timeout=120)
    assert (torch.load(tmp_path / "logits.pt") - logits).abs().max() < 1e-4


def test_transposed_layers_are_added_correctly(tmp_path: Path) -> None:
    """GPT-2 uses Conv1D, where PEFT's fan_in_fan_out transposes ΔW."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(base)
    kinds = {"a": {"r": 3, "lora_alpha": 5}, "b": {"r": 2, "lora_alpha": 8, "use_rslora": True}}
    expected = {
        name: peft_adapter(base, tmp_path / name, i, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **kind)
        for i, (name, kind) in enumerate(kinds.items())
    }
    delta = peft_format.load(tmp_path / "a") - 0.5 * peft_format.load(tmp_path / "b")
    peft_format.save(tmp_path / "mix", delta.items(), list(delta), BaseInfo(str(base), transposed=True))
    dense = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in dense.named_modules():
        if name in expected["a"]:
            layer.weight.data += expected["a"][name] - 0.5 * expected["b"][name]
    mixed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "mix")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert (mixed(ids).logits - dense(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
def test_saved_sums_round_each_factor_once(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    """A and B are rounded once each, so the error of an entry of ΔW is at most 2 · bound · |B| |A|."""
    draw = torch.Generator().manual_seed(0)
    parts = [
        LoraDelta.of({"q": Factors(*(torch.randn(*shape, generator=draw) for shape in ((40, 4), (4, 30))))})
        for _ in range(3)
    ]
    whole = 0.3 * parts[0] - 1.7 * parts[1] + parts[2]
    peft_format.save(tmp_path, whole.items(), list(whole), BaseInfo("b"), dtype)
    stored = Adapter(tmp_path)
    assert stored.dtype == dtype
    B, A = stored["q"].B.double(), stored["q"].A.double()
    exact = sum((w * p["q"].B.double() @ p["q"].A.double() for w, p in zip((0.3, -1.7, 1), parts, strict=True)))
    allowed = bound * whole["q"].B.double().abs() @ whole["q"].A.double().abs()
    assert ((B @ A - exact).abs() <= 1.01 * allowed).all()


@pytest.mark.parametrize("weight", [1.0, 1e-2, 1e-4])
def test_float16_preserves_small_updates(weight: float, tmp_path: Path) -> None:
    """A trained B is small, and a weight makes it smaller; moving a power of two to A is exact."""
    draw = torch.Generator().manual_seed(0)
    small = LoraDelta.of({"q": Factors(1e-3 * torch.randn(40, 4, generator=draw), torch.randn(4, 30, generator=draw))})
    whole = small * weight
    peft_format.save(tmp_path, whole.items(), list(whole), BaseInfo("b"), torch.float16)
    assert (peft_format.load(tmp_path) - whole).norm() <= 2**-10 * whole.norm()


def test_value_too_large_for_its_dtype_is_refused(tmp_path: Path) -> None:
    delta = LoraDelta.of({"q": Factors(torch.full((2, 1), 1e6), torch.full((1, 2), 1e6))})
    with pytest.raises(UserError, match="too large for float16; give smaller weights or --dtype float32"):
        peft_format.save(tmp_path, delta.items(), list(delta), BaseInfo("b"), torch.float16)


def test_half_precision_adapters_are_scaled_in_float32(llama: Path, tmp_path: Path) -> None:
    peft_adapter(llama, tmp_path, 0, **{**KINDS["plain"], "lora_alpha": 7})
    file = tmp_path / peft_format.WEIGHTS
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    for name, factors in peft_format.load(tmp_path).items():
        B, A = (stored[f"{peft_format.PREFIX}{name}.lora_{side}.weight"].double() for side in "BA")
        assert torch.allclose(factors.B.double() @ factors.A.double(), B @ A * 7 / 4, atol=1e-6)


def test_save_and_load_round_trip(llama: Path, tmp_path: Path) -> None:
    peft_adapter(llama, tmp_path / "a", 0, **KINDS["patterns"])
    delta = peft_format.load(tmp_path / "a")
    peft_format.save(tmp_path / "b", delta.items(), list(delta), BaseInfo(str(llama)))
    again = peft_format.load(tmp_path / "b")
    assert all(torch.equal(again[n].A, f.A) and torch.equal(again[n].B, f.B) for n, f in delta.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8)])
def test_adding_and_saving_commute(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    """Weights that are powers of two cause no rounding; other weights round each factor once more."""
    draw = torch.Generator().manual_seed(0)
    for name in "ab":
        parts = {m: Factors(*(torch.randn(*s, generator=draw) for s in ((40, 4), (4, 30)))) for m in ("q", "v")}
        peft_format.save(tmp_path / name, parts.items(), list(parts), BaseInfo("b"), dtype)
        torch.save(parts, tmp_path / f"{name}.pt")
    memory = {n: LoraDelta.of(torch.load(tmp_path / f"{n}.pt", weights_only=False)) for n in "ab"}
    for weights, allowed in (((0.5, -2.0), 0.0), ((0.3, -1.7), 2 * bound)):
        added = memory["a"] * weights[0] + memory["b"] * weights[1]
        peft_format.save(tmp_path / "added", added.items(), list(added), BaseInfo("b"), dtype)
        merged_first = peft_format.load(tmp_path / "added")
        saved_first = peft_format.load(tmp_path / "a") * weights[0] + peft_format.load(tmp_path / "b") * weights[1]
        for name in ("q", "v"):
            one, other = merged_first[name], saved_first[name]
            assert ((one.B - other.B).abs() <= allowed * other.B.abs()).all()
            assert torch.equal(one.A, other.A)


@pytest.mark.parametrize(
    "targets",
    [r".*layers\.1\.self_attn\.(q|v)_proj", ["layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj"]],
)
def test_adapters_of_selected_layers_load(targets: Any, llama: Path, tmp_path: Path) -> None:
    expected = peft_adapter(llama, tmp_path, 0, r=2, lora_alpha=4, target_modules=targets)
    assert set(peft_format.load(tmp_path)) == set(expected)
    assert len(expected) == 2
    if isinstance(targets, list):
        file = tmp_path / peft_format.WEIGHTS
        save_file({key: tensor for key, tensor in load_file(file).items() if "layers.0" not in key}, file)
        with pytest.raises(UserError, match=r"there is no layers\.0\.self_attn\.v_proj; tensors are missing"):
            peft_format.load(tmp_path)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    peft_adapter(llama, tmp_path, 0, **KINDS["plain"])
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("auto_mapping", {"base_model_class": "x"}, "code"),
        ("target_parameters", ["x"], "target_parameters"),
        ("layer_replication", [[0, 1]], "replicated"),
        ("brand_new_option", 1, "unknown key 'brand_new_option'"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("trainable_token_indices", [3], "trained tokens"),
        ("alora_invocation_tokens", [3], "activated"),
        ("use_qalora", True, "pools"),
        ("init_lora_weights", "pissa", "need a changed base"),
        ("init_lora_weights", "olora", "need a changed base"),
        ("r", 5, "says rank 5"),
        ("r", "4", 'r cannot be "4"'),
        ("r", 0, "r cannot be 0"),
        ("lora_alpha", float("inf"), "lora_alpha cannot be Infinity"),
        ("rank_pattern", {"(": 2}, "rank_pattern cannot be"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern cannot be"),
        ("target_modules", None, "target_modules cannot be null"),
        ("target_modules", ["q_proj"], "down_proj is not among the target_modules"),
        ("layers_to_transform", "all", "layers_to_transform cannot be"),
        ("target_modules", "a{4294967295}", "target_modules cannot be"),
        ("rank_pattern", {"(?i)q_proj": 2}, "rank_pattern cannot be"),
        ("rank_pattern", {r"(?:.|.)*z?\d": 2}, "takes too long to match"),
        ("target_modules", "([a-z._0-9]+)+X", "is not among the target_modules"),
        ("lora_alpha", 10**400, "lora_alpha cannot be"),
        ("base_model_name_or_path", 5, "base_model_name_or_path cannot be 5"),
        ("peft_type", "LOHA", "not a LoRA adapter"),
        ("layers_to_transform", [0], "is not among the target_modules"),
        ("layers_to_transform", 0, "is not among the target_modules"),
        ("exclude_modules", ["q_proj"], "is not among the target_modules"),
        ("exclude_modules", 3, "exclude_modules cannot be 3"),
    ],
)
def test_configurations_beyond_plain_lora_are_refused(folder: Path, key: str, value: object, message: str) -> None:
    file = folder / peft_format.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        peft_format.load(folder)


def _spoil(tensors: dict[str, torch.Tensor], fault: str) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    if fault == "too large once scaled":
        next(tensor for key, tensor in tensors.items() if "lora_B" in key)[0, 0] = 2.5e38
    elif fault == "nan":
        tensors[first][0, 0] = float("nan")
    elif fault == "missing":
        del tensors[first]
    elif fault == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 2)
    elif fault == "traversing":
        tensors["base_model.model.\x1b[31m../../q_proj.lora_A.weight"] = torch.ones(4, 2)
        tensors["base_model.model.\x1b[31m../../q_proj.lora_B.weight"] = torch.ones(2, 4)
    elif fault == "integers":
        tensors[first] = tensors[first].to(torch.int8)
    elif fault == "extra":
        tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    elif fault == "empty":
        tensors = {}
    return tensors


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "not finite"),
        ("too large once scaled", "not finite, or overflow when scaled"),
        ("missing", "not the other factor"),
        ("extra", "not a LoRA tensor"),
        ("embedding", "not a LoRA tensor"),
        ("traversing", "not among the target_modules"),
        ("integers", "stored as I8"),
        ("empty", "no LoRA tensors"),
    ],
)
def test_invalid_tensors_are_refused(folder: Path, fault: str, message: str) -> None:
    file = folder / peft_format.WEIGHTS
    save_file(_spoil(load_file(file), fault), file)
    with pytest.raises(UserError, match=message) as raised:
        dict(peft_format.load(folder))
    assert "\x1b" not in str(raised.value)


def test_truncated_files_and_pickles_are_refused(folder: Path) -> None:
    file = folder / peft_format.WEIGHTS
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or cut short"):
            peft_format.load(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        peft_format.load(folder)


def test_common_keeps_shared_targets_only(folder: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    peft_adapter(llama, other, 1, **KINDS["rslora"])
    one, two = Adapter(folder).config, Adapter(other).config
    assert BaseInfo.common([one, one]).targets == ("down_proj", "q_proj")
    assert BaseInfo.common([one, two]).targets == ()
    assert BaseInfo.common([{**one, "layers_to_transform": [0, 1]}] * 2).targets == (), (
        "endings alone would mean all layers"
    )
    assert BaseInfo.common([one, {**two, "task_type": "FEATURE_EXTRACTION"}]).task is None
    assert BaseInfo.common([{**one, "base_model_name_or_path": None}, two]).base == one["base_model_name_or_path"]

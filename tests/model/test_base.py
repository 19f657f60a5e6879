"""The base in NF4: its fingerprint, its gradients and its 4-bit cache."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_align import recipe, store
from lora_align.data.rows import Message
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.nf4 import DequantisedLinear4bit
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.streaming import stream_tokens
from support import small_disk

IDS = torch.arange(5, 45).view(2, 20)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def _twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the same model in float32, with dequantised weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = dict(twin.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            layers[name].weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return twin.requires_grad_(False)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _with_adapter(model: PreTrainedModel) -> torch.nn.Module:
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for i, (name, parameter) in enumerate(sorted(wrapped.named_parameters())):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(i)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return wrapped


@pytest.mark.parametrize("which", ["demo", "tiny"])
@pytest.mark.parametrize("dequantised", [True, False])
def test_gradients_equal_those_of_a_dense_twin(
    which: str, dequantised: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.find(recipe.Base("demo" if which == "demo" else str(llama)))
    model = _loaded(base, dequantised, monkeypatch)
    twin = _with_adapter(_twin(model, base.folder))
    policy = _with_adapter(model)
    expected = _gradients(twin)
    assert len(expected) == 2 * 7 * model.config.num_hidden_layers
    before = _gradients(policy)

    policy.eval()
    with torch.no_grad():
        policy(input_ids=IDS)
    prompt = base.chat.prompt_ids([Message("user", "Tell me about cats.")])
    assert list(stream_tokens(model, prompt, frozenset(), Sampling(max_new_tokens=4, seed=0)))
    after = _gradients(policy)
    for name, gradient in expected.items():
        scale = gradient.norm()
        assert (before[name] - gradient).norm() < 1e-4 * scale, name
        assert (after[name] - gradient).norm() < 1e-4 * scale, name


def _loaded(base: Base, dequantised: bool, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Load a base with or without dequantised layers."""
    monkeypatch.setattr("lora_align.model.nf4.SHARE", 1.0 if dequantised else 0.0)
    model = base.load()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert {isinstance(layer, DequantisedLinear4bit) for layer in layers} == {dequantised}
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantised_layers_give_the_bits_of_4bit_layers(
    dtype: Literal["float32", "bfloat16"], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.find(recipe.Base(str(llama), dtype=dtype))
    stock, ours = (_loaded(base, dequantised, monkeypatch) for dequantised in (False, True))
    with torch.no_grad():
        assert torch.equal(stock(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    expected, actual = (_gradients(_with_adapter(model)) for model in (stock, ours))
    assert actual
    for name, gradient in expected.items():
        assert torch.equal(gradient, actual[name]), name


def test_dequantised_base_is_saved_in_4bit(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = bases.find(recipe.Base(str(llama)))
    for dequantised in (False, True):
        _loaded(base, dequantised, monkeypatch).save_pretrained(tmp_path / str(dequantised))
    stock, ours = (tmp_path / str(dequantised) / "model.safetensors" for dequantised in (False, True))
    assert stock.read_bytes() == ours.read_bytes()


def test_base_has_no_attention_dropout_in_training(llama: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    shutil.copytree(llama, noisy)
    config = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = bases.find(recipe.Base(str(noisy))).load().train()
    ids = torch.arange(4, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fingerprint_depends_on_the_weights_alone(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    first, second = bases.find(recipe.Base(str(llama))), bases.find(recipe.Base(str(copy)))
    assert first.fingerprint == second.fingerprint != bases.find(recipe.Base("demo")).fingerprint
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert bases.find(recipe.Base(str(copy))).fingerprint != first.fingerprint


def test_large_base_is_quantised_once_and_cached(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path))
    base = bases.find(recipe.Base(str(llama)))
    direct = base.load()
    first, second = base.load(cache_from=0), base.load(cache_from=0)
    cached = [path for path in (tmp_path / "bases").iterdir() if path.is_dir()]
    assert len(cached) == 1
    with torch.no_grad():
        logits = [model(input_ids=IDS).logits for model in (direct, first, second)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert json.loads((cached[0] / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_full_disk_while_caching_is_an_error(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = bases.find(recipe.Base(str(llama)))
    with small_disk(tmp_path / "disk", "256k") as disk:
        monkeypatch.setenv("LORA_ALIGN_CACHE", str(disk))
        with pytest.raises(UserError, match=r"about \d+ kB will be written") as refused:
            base.load(cache_from=0)
        assert refused.value.exit_code == 2
        monkeypatch.setattr(store, "check_free_space", lambda *_: None)  # as if the disk filled up after the check
        with pytest.raises(RunFailedError, match=r"could not be cached .*LORA_ALIGN_CACHE moves the cache"):
            base.load(cache_from=0)
        assert [path for path in (disk / "bases").iterdir() if path.is_dir()] == []


def test_quantization_none_loads_no_4bit_layers(llama: Path) -> None:
    model = bases.find(recipe.Base(str(llama), quantization="none")).load()
    assert not any(isinstance(m, Linear4bit) for m in model.modules())


def test_base_without_a_template_needs_one_in_the_recipe(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "raw")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template; give one in the recipe: base\.chat_template"):
        bases.find(recipe.Base(str(copy)))
    chat = bases.find(recipe.Base(str(copy), chat_template=PLAIN)).chat
    assert chat.tokenizer.decode(chat.prompt_ids([Message("user", "hi")])).startswith("user: hi")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/nothing", "not in the cache and the hub cannot be reached"),
        ("./nowhere", "neither a folder, nor a GGUF file, nor a hub id"),
        ("nowhere", "neither a folder, nor a GGUF file, nor a hub id"),
    ],
)
def test_missing_base_is_refused(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bases.find(recipe.Base(model))


def test_error_names_the_missing_shard_of_a_base(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "half")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UserError, match=r"missing: model-2\.safetensors"):
        bases.find(recipe.Base(str(copy)))
    index.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        bases.find(recipe.Base(str(copy)))


def test_pickle_weights_and_empty_folders_are_refused(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "pickled")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        bases.find(recipe.Base(str(copy)))
    with pytest.raises(UserError, match=r"no config\.json"):
        bases.find(recipe.Base(str(tmp_path)))


@pytest.mark.parametrize(
    ("gpu", "quantization", "expected", "dtype"),
    [
        ("xpu", "nf4", "xpu:0", torch.bfloat16),
        ("mps", "none", "mps:0", torch.float32),
        ("mps", "nf4", "cpu", torch.float32),
        ("privateuseone", "none", "cpu", torch.float32),
        (None, "nf4", "cpu", torch.float32),
    ],
)
def test_device_is_chosen_among_those_that_torch_has(
    gpu: str | None,
    quantization: Literal["nf4", "none"],
    expected: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = torch.device(gpu) if gpu else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    settings = recipe.Base("demo", quantization=quantization)
    assert bases.device(settings) == torch.device(expected)
    assert bases.compute_dtype(settings) == dtype

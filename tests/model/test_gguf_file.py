"""GGUF files as bases: equal to the model that they were written from, or refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hub import read, serving
from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.rsf.serving import serve_command
from lora_align.train.lora_trainer import adapter_config
from support import make_base

IDS = torch.arange(5, 45).view(2, 20)
PIECES = ["▁a", "▁ab", "ab", "▁", "a", "b"]
F32, Q8, Q4 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1"))


def write_byte_pairs(writer: gguf.GGUFWriter, base: Path) -> None:
    """Write the base's own tokens, as those of Llama 3 and Qwen."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.added_tokens_encoder)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads((base / "tokenizer.json").read_text())["model"]["merges"]]
    )


def write_sentencepiece(writer: gguf.GGUFWriter, base: Path) -> None:
    """Write other tokens with scores and bytes, as those of Llama 2 and Mistral."""
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    kinds |= {f"<0x{byte:02X}>": gguf.TokenType.BYTE for byte in range(256)}
    kinds |= dict.fromkeys(PIECES, gguf.TokenType.NORMAL)
    unused = AutoConfig.from_pretrained(base).vocab_size - len(kinds)
    kinds |= {f"<unused{number}>": gguf.TokenType.CONTROL for number in range(unused)}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(kinds))
    writer.add_token_types(list(kinds.values()))
    writer.add_token_scores([-float(number) for number in range(len(kinds))])


def write_gguf(
    base: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType = F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    omit: str = "",
    write_tokens: Callable[[gguf.GGUFWriter, Path], None] = write_byte_pairs,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a folder's model as a GGUF file, as llama.cpp's converter does. Return what the file's weights stand for.

    Llama's q and k rows are stored in another order, and Gemma's norms plus one.
    """
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arch = config.model_type
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    write_tokens(writer, base)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eot_token_id(4)
    writer.add_chat_template(tokenizer.chat_template)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tied, weights = config.tie_word_embeddings, {}
    for name, tensor in model.state_dict().items():
        if name == omit or (tied and name == "lm_head.weight"):
            continue
        stored = tensor.numpy()
        if arch == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            stored = stored.reshape(-1, 2, config.head_dim // 2, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
        if arch == "gemma2" and name.endswith("norm.weight"):
            stored = stored + 1
        if stored.ndim == 2 and kind != F32:
            data = gguf.quants.quantize(stored, kind)
            stored = gguf.quants.dequantize(data, kind)
            writer.add_tensor(str(names.get_name(name, [".weight"])), data, raw_dtype=kind)
        else:
            writer.add_tensor(str(names.get_name(name, [".weight"])), stored)
        weights[name] = stored
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _found(file: Path, **settings: Any) -> Base:
    return bases.find(recipe.Base(str(file), quantization="none", **settings))


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_and_token_ids_equal_those_of_the_original(family: str, tmp_path: Path) -> None:
    original = make_base(tmp_path / "original", family)
    file = tmp_path / f"{family}.gguf"
    write_gguf(original, file)
    base, expected = _found(file), bases.find(recipe.Base(str(original), quantization="none"))
    assert torch.equal(_logits(base.load()), _logits(expected.load()))
    talk = [Message("system", "Be brief."), Message("user", "Tell me about  cats,\n\n 1234 naïve ones.")]
    assert base.chat.prompt_ids(talk) == expected.chat.prompt_ids(talk)
    assert base.chat.template == expected.chat.template
    assert base.chat.stop_ids == {*expected.chat.stop_ids, 4}  # the end of a turn is a stop token, too
    assert base.max_length == expected.max_length


def test_sentencepiece_tokens_are_read_with_their_spaces_and_bytes(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "pieces.gguf"
    write_gguf(llama, file, write_tokens=write_sentencepiece)
    tokenizer = _found(file).chat.tokenizer
    ids = {name: number for number, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))}
    expected = ["▁ab", "▁", "b", "a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer("ab ba é", add_special_tokens=False).input_ids == [ids[name] for name in expected]


@pytest.mark.parametrize("kind", [Q8, Q4])
def test_quantised_weights_are_the_numbers_they_stand_for(
    kind: gguf.GGMLQuantizationType, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "quantised.gguf"
    weights = write_gguf(llama, file, kind)
    model = _found(file).load()
    for name, weight in model.state_dict().items():
        if "q_proj" not in name and "k_proj" not in name and name in weights:
            assert np.array_equal(weight.numpy(), weights[name]), name
    nf4 = bases.find(recipe.Base(str(file))).load()
    assert "Linear4bit" in {type(module).__name__.removeprefix("Dequantised") for module in nf4.modules()}


def test_file_is_converted_once_and_known_by_its_hash(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path / "cache"))
    file, moved = tmp_path / "a.gguf", tmp_path / "b" / "a.gguf"
    write_gguf(llama, file)
    first = _found(file)
    made = (first.folder / "model.safetensors").stat().st_mtime_ns
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    second = _found(moved)
    assert second.fingerprint == first.fingerprint
    assert (second.folder / "model.safetensors").stat().st_mtime_ns == made


def test_file_on_the_hub_is_fetched_once(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "a.gguf")
    wanted = {"model": "owner/name/a.gguf", "revision": "main", "quantization": "none"}
    with serving({"owner/name": {"main": {"a.gguf": (tmp_path / "a.gguf").read_bytes()}}}) as address:
        assert read(address, tmp_path, wanted) == ["owner/name/a.gguf"]
    assert read("http://127.0.0.1:9", tmp_path, wanted, offline=True) == ["owner/name/a.gguf"]


def test_server_gets_the_converted_folder(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "a.gguf")
    settings = recipe.load(recipe.builtin()["demo"], [f"base.model={json.dumps(str(tmp_path / 'a.gguf'))}"])
    assert f"vllm serve {_found(tmp_path / 'a.gguf').folder} " in serve_command(settings)


def test_llama_3_rotary_scaling_is_read(tmp_path: Path) -> None:
    original = make_base(tmp_path / "original", positions=1024)
    settings = json.loads((original / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["rope_parameters"] |= {**scaling, "original_max_position_embeddings": 8192}
    (original / "config.json").write_text(json.dumps(settings))
    expected = AutoModelForCausalLM.from_pretrained(original)
    plain = 1 / settings["rope_parameters"]["rope_theta"] ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / expected.model.rotary_emb.inv_freq).numpy()
    file = tmp_path / "llama3.gguf"
    write_gguf(original, file, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    assert torch.allclose(_logits(_found(file).load()), _logits(expected), atol=1e-5)

    file = tmp_path / "other.gguf"
    write_gguf(original, file, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors * 2))
    with pytest.raises(UserError, match="rotary factors are not those of Llama 3"):
        _found(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.add_string("general.architecture", "unheard"), "unheard is not supported"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"rotary scaling \(yarn\)"),
        (lambda w: w.add_string("general.type", "adapter"), "of type 'adapter', not a model"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda w: w.add_uint32("llama.attention.key_length", 48), "key_length is 48, but transformers would use 32"),
        (lambda w: w.add_uint32("llama.attention.head_count", 4), "cannot read this GGUF file"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, dtype=np.float32)), "weights, of which transformers"),
    ],
)
def test_file_that_would_be_misread_is_refused(
    change: Callable[[gguf.GGUFWriter], None], reason: str, llama: Path, tmp_path: Path
) -> None:
    def replace_key(writer: gguf.GGUFWriter) -> None:
        before = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        change(writer)
        writer.kv_data[0] = {**before, **writer.kv_data[0]}

    file = tmp_path / "other.gguf"
    write_gguf(llama, file, change=replace_key)
    with pytest.raises(UserError, match=reason):
        _found(file)
    assert not list((tmp_path).glob("*.staging"))


def test_missing_weight_is_refused(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.gguf"
    write_gguf(llama, file, omit="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        UserError, match=r"finds no model\.layers\.1\.mlp\.up_proj\.weight in the file \(1 weight missing\)"
    ):
        _found(file)


@pytest.mark.parametrize("length", [0, 3, 100, -5000])
def test_truncated_file_is_refused(length: int, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    write_gguf(llama, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"whole\.gguf: transformers cannot read this GGUF file"):
        _found(file)


def test_missing_file_names_both_ways(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none\.gguf; base.model may also be .*owner/name/file\.gguf"):
        _found(tmp_path / "none.gguf")
    with pytest.raises(UserError, match=r"hf download owner/name file\.gguf"):
        bases.find(recipe.Base("owner/name/file.gguf"))


def test_adapters_name_a_folder_that_peft_loads(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "small.gguf")
    adapter = adapter_config(recipe.Lora(), _found(tmp_path / "small.gguf"))
    assert adapter.base_model_name_or_path
    AutoModelForCausalLM.from_pretrained(adapter.base_model_name_or_path)

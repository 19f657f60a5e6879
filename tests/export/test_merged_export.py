"""`export --merged`: weights, files and refusals. Stock PEFT and transformers check them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_align import recipe
from lora_align.adapters import peft_format
from lora_align.data.rows import Message
from lora_align.demo import BASE
from lora_align.errors import UserError
from lora_align.export.checkpoint import Checkpoint
from lora_align.export.merged_export import CONVERTER
from lora_align.model import base as bases
from lora_align.model.nf4 import Linear4bit, dense_weight
from support import Cli, fill, peft_adapter, small_disk

STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Hello"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
logits = model(torch.tensor([ids])).logits[0, -1].float()
assert "lora_align" not in sys.modules
print(json.dumps({"ids": ids, "logits": logits.tolist(), "dtype": str(model.dtype)}))
"""


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    """A llama in several files, with an adapter of stock PEFT beside it."""
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    peft_adapter(llama, tmp_path / "one", 0, r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    return tmp_path


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-10)])
def test_weights_are_those_of_the_base_plus_the_mix(workspace: Path, cli: Cli, dtype: str, error: float) -> None:
    words = ("helpful=1,harmless=-0.5", "--merged", "out", "--no-check", "--json")
    done = cli("export", *words, *(["--dtype", dtype] if dtype != "bfloat16" else []))
    assert done.code == 0, done.err
    signs = {"helpful/pos": 1.0, "helpful/neg": -1.0, "harmless/pos": -0.5, "harmless/neg": 0.5}
    parts = [(peft_format.load(workspace / "runs/dpo" / name), sign) for name, sign in signs.items()]
    before, after = weights_of(BASE), weights_of(workspace / "out")
    assert before.keys() == after.keys()
    squares = {"update": 0.0, "rounding": 0.0}
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        expected = weight.double()
        if module in parts[0][0]:
            update = sum(sign * (part[module].B.double() @ part[module].A.double()) for part, sign in parts)
            expected = expected + update
            squares["update"] += float(update.square().sum())
            squares["rounding"] += float((after[name].double() - expected).square().sum())
        assert after[name].dtype == (getattr(torch, dtype) if weight.ndim > 1 else weight.dtype)
        assert torch.allclose(after[name].double(), expected, rtol=error, atol=1e-7), name
    found = json.loads(done.out)["figures"].get(f"error of rounding to {dtype} / norm of the mix", 0.0)
    assert found == pytest.approx((squares["rounding"] / squares["update"]) ** 0.5, rel=0.05, abs=1e-4)


def test_dequantised_adds_to_the_weights_that_training_saw(workspace: Path, cli: Cli) -> None:
    words = ("export", "helpful=1", "--dtype", "float32", "--no-check", "--json")
    done, plain = cli(*words, "--merged", "out", "--dequantised"), cli(*words, "--merged", "plain")
    assert done.code == plain.code == 0, done.err
    pos, neg = (peft_format.load(workspace / "runs/dpo/helpful" / name) for name in ("pos", "neg"))
    after, squares = weights_of(workspace / "out"), {"error": 0.0, "update": 0.0}
    before = weights_of(BASE)
    layers = {n: m for n, m in bases.find(recipe.Base("demo")).load().named_modules() if isinstance(m, Linear4bit)}
    assert layers
    for name, layer in layers.items():
        dense, found = dense_weight(layer).float(), after[f"{name}.weight"]
        if name not in pos:
            assert torch.equal(found, dense), name
            continue
        update = pos[name].B @ pos[name].A - neg[name].B @ neg[name].A
        assert torch.allclose(found, dense + update, atol=1e-6), name
        squares["error"] += float((dense - before[f"{name}.weight"]).square().sum())
        squares["update"] += float(update.square().sum())
    share = (squares["error"] / squares["update"]) ** 0.5
    assert json.loads(plain.out)["figures"]["error of NF4 / norm of the mix"] == pytest.approx(share, rel=0.05)
    assert "error of NF4 / norm of the mix" not in json.loads(done.out)["figures"]


def test_checkpoint_knows_which_layers_are_quantised() -> None:
    base = bases.find(recipe.Base("demo"))
    loaded = {f"{name}.weight" for name, m in base.load().named_modules() if isinstance(m, Linear4bit)}
    assert Checkpoint.of(base).quantised == loaded


def test_answers_are_those_of_the_mix(workspace: Path, cli: Cli) -> None:
    """Exact weights give the mix's answers. NF4 beneath the mix gives others, the dequantised base hardly."""
    kl = {}
    for name, options in {
        "exact": ["--set", 'base.quantization="none"', "--dtype", "float32"],
        "nf4": [],
        "dequantised": ["--dequantised"],
    }.items():
        done = cli("export", "helpful=1", "--merged", name, "--json", *options)
        assert done.code == 0, done.err
        kl[name] = json.loads(done.out)["figures"]["KL(mix‖merged), nats per token"]
    assert abs(kl["exact"]) < 1e-6
    assert kl["exact"] < kl["dequantised"] < kl["nf4"]


def test_stock_transformers_loads_the_folder(workspace: Path, cli: Cli) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %} !"
    done = cli("export", "helpful=1", "--merged", "out", "--no-check", "--set", f'base.chat_template="{template}"')
    assert done.code == 0, done.err
    words = [sys.executable, "-c", STOCK, str(workspace / "out")]
    stock = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert stock["dtype"] == "torch.bfloat16"
    chat = bases.find(recipe.Base("demo", chat_template=template)).chat
    assert stock["ids"] == chat.prompt_ids([Message("user", "Hello")])
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for sign, name in ((1, "helpful/pos"), (-1, "helpful/neg")):
        part = peft_format.load(workspace / "runs/dpo" / name)
        for module, factors in part.items():
            model.get_submodule(module).weight.data += sign * (factors.B @ factors.A).float()
    with torch.no_grad():
        logits = model(torch.tensor([stock["ids"]])).logits[0, -1]
    assert torch.allclose(torch.tensor(stock["logits"]), logits, atol=0.05 * float(logits.std()))
    assert "- `helpful`: weight 1" in (workspace / "out/README.md").read_text()


def test_files_of_the_base_are_kept(sharded: Path, cli: Cli) -> None:
    words = ("export", "./one", "--set", 'base.model="base"', "--merged", "out", "--dtype", "float32", "--no-check")
    done = cli(*words)
    assert done.code == 0, done.err
    names = sorted(file.name for file in (sharded / "base").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert sorted(file.name for file in (sharded / "out").iterdir()) == sorted([*names, "README.md"])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharded / "base"), sharded / "one")
    found = AutoModelForCausalLM.from_pretrained(sharded / "out").state_dict()
    for name, weight in expected.merge_and_unload().state_dict().items():
        assert torch.allclose(found[name], weight, atol=1e-6), name


def test_value_of_an_unchanged_weight_that_float16_cannot_hold_is_refused(sharded: Path, cli: Cli) -> None:
    [file] = [
        file for file in (sharded / "base").glob("*.safetensors") if "model.embed_tokens.weight" in load_file(file)
    ]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 5] = 1e5
    save_file(tensors, file, {"format": "pt"})
    words = ("export", "./one", "--set", 'base.model="base"', "--merged", "out", "--no-check", "--dtype")
    refused, done = cli(*words, "float16"), cli(*words, "bfloat16")
    assert refused.code == 2
    assert "model.embed_tokens.weight: a value is too large for float16; give --dtype bfloat16" in refused.err
    assert done.code == 0, done.err


def test_transposed_layers_are_merged(tmp_path: Path, cli: Cli) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=2, n_positions=256)).save_pretrained(
        tmp_path / "base"
    )
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    peft_adapter(tmp_path / "base", tmp_path / "one", 0, r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    done = cli("export", "./one", "--set", 'base.model="base"', "--merged", "out", "--dtype", "float32", "--no-check")
    assert done.code == 0, done.err
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "one")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in expected.merge_and_unload().state_dict().items():
        assert torch.allclose(found[name], weight, atol=1e-6), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export: give one of --gguf, --merged, --gguf-merged, --ollama"),
        (["--merged", "a", "--gguf", "b"], "export: give one of --gguf, --merged, --gguf-merged, --ollama"),
        (["--gguf-merged", "a.gguf"], "convert_hf_to_gguf.py is not on PATH; it is part of llama.cpp"),
        (["--merged", "runs"], "--merged: runs exists; delete it, or give another path"),
        (["--merged", "no/out"], "--merged no/out: there is no folder no"),
        (["--merged", "out", "--each"], "--each has no effect with --merged; it needs --gguf"),
        (["--gguf", "out", "--dequantised"], "--dequantised has no effect with --gguf; it needs --merged or --gguf"),
        (
            ["--gguf", "out", "--no-check"],
            "--no-check has no effect with --gguf; it needs --merged or --gguf-merged or",
        ),
        (["--merged", "out", "--dtype", "q8_0"], "with --merged, expected one of bfloat16, float16, float32"),
        (
            ["--merged", "o", "--dequantised", "--set", 'base.quantization="none"'],
            "--dequantised: base.quantization is",
        ),
    ],
)
def test_merged_export_refuses(workspace: Path, cli: Cli, words: list[str], message: str) -> None:
    done = cli("export", "helpful=1", *words)
    assert done.code == 2
    assert message in done.err


def test_module_without_a_weight_of_its_own_is_refused(sharded: Path) -> None:
    config = json.loads((sharded / "base/config.json").read_text())
    (sharded / "base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    checkpoint = Checkpoint.of(bases.find(recipe.Base(str(sharded / "base"))))
    with pytest.raises(UserError, match="lm_head cannot be merged: its weight is that of the embeddings"):
        checkpoint.tensor("lm_head")


def test_module_that_the_files_lack_is_refused(sharded: Path) -> None:
    checkpoint = Checkpoint.of(bases.find(recipe.Base(str(sharded / "base"))))
    for file in checkpoint.files:
        file.entries.pop("model.layers.0.self_attn.q_proj.weight", None)
    with pytest.raises(UserError, match=r"base has no tensor model\.layers\.0\.self_attn\.q_proj\.weight"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj")


def test_weights_of_an_unknown_type_are_refused(sharded: Path, cli: Cli) -> None:
    file = min((sharded / "base").glob("*.safetensors"))
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name].long()}, file, {"format": "pt"})
    done = cli("export", "./one", "--set", 'base.model="base"', "--merged", "out", "--no-check")
    assert done.code == 2
    assert f"{name} has the type I64; known: F64, F32, F16, BF16" in done.err


def test_weights_that_the_configuration_contradicts_are_refused(sharded: Path, cli: Cli) -> None:
    config = json.loads((sharded / "base/config.json").read_text())
    (sharded / "base/config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    done = cli("export", "./one", "--set", 'base.model="base"', "--merged", "out", "--no-check")
    assert done.code == 2
    assert "but config.json says (" in done.err


def test_damaged_base_is_named_before_its_hash(workspace: Path, cli: Cli) -> None:
    shutil.copytree(BASE, workspace / "base")
    with (workspace / "base/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = cli("export", "helpful=1", "--set", 'base.model="base"', "--merged", "out")
    assert done.code == 2
    assert "base/model.safetensors: damaged or cut short (1,000 bytes)" in done.err


def test_other_template_than_that_of_training_causes_a_warning(workspace: Path, cli: Cli) -> None:
    template = 'base.chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"'
    done = cli("export", "helpful=1", "--merged", "out", "--no-check", "--set", template)
    assert done.code == 0, done.err
    assert "the chat template or tokenizer of the recipe is not that of the vectors' training" in done.err


def test_other_tokenizer_than_that_of_training_causes_a_warning(workspace: Path, cli: Cli) -> None:
    shutil.copytree(BASE, workspace / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(workspace / "base")
    done = cli("export", "helpful=1", "--merged", "out", "--no-check", "--set", 'base.model="base"')
    assert done.code == 0, done.err
    assert "the chat template or tokenizer of the recipe is not that of the vectors' training" in done.err


def test_weights_that_break_the_model_are_refused(workspace: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1e30", "--merged", "out")
    assert done.code == 1
    assert "computes values that are not finite; give smaller weights" in done.err
    assert not (workspace / "out").exists()


def test_large_error_of_rounding_causes_a_warning(workspace: Path, cli: Cli) -> None:
    done = cli("export", "helpful=0.001", "--merged", "out", "--no-check")
    assert done.code == 0, done.err
    assert re.search(r"rounding to bfloat16 is [\d.]+ times the mix; give --dtype float32", done.err)


def put_on_path(folder: Path, converter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program with the name of llama.cpp's converter on PATH."""
    folder.mkdir()
    (folder / CONVERTER).write_text(converter)
    (folder / CONVERTER).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("#!/bin/sh\nexit 3\n", "failed: exit code 3"),
        ("#!/bin/sh\necho no such model >&2; exit 1\n", "failed: no such model"),
        ("#!/bin/sh\n", "wrote no file"),
        ("no program", "does not run: Exec format error"),
    ],
)
def test_fault_of_the_converter_is_reported(
    program: str, message: str, workspace: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(workspace / "bin", program, monkeypatch)
    done = cli("export", "helpful=1", "--gguf-merged", "out.gguf", "--no-check")
    assert done.code == 1
    assert f"{CONVERTER} {message}" in done.err
    assert not list(workspace.glob("*out*"))


def test_full_disk_leaves_nothing(sharded: Path, cli: Cli) -> None:
    words = ("export", "./one", "--set", 'base.model="base"', "--merged", "disk/out", "--no-check")
    with small_disk(sharded / "disk", "440k") as disk:
        failed = cli(*words)  # no room for the tokenizer, which is not counted beforehand
        assert list(disk.iterdir()) == []
        fill(disk)
        refused = cli(*words)
    assert (failed.code, refused.code) == (1, 2)
    assert "disk/out: No space left on device" in failed.err
    assert "make room, or write to another disk" in refused.err


def test_merged_gguf_does_not_begin_without_room_for_two_models(
    sharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(sharded / "bin", "#!/bin/sh\n", monkeypatch)
    with small_disk(sharded / "disk", "440k") as disk:
        refused = cli("export", "./one", "--set", 'base.model="base"', "--gguf-merged", "disk/out.gguf", "--no-check")
        assert list(disk.iterdir()) == []
    assert refused.code == 2
    assert "error: disk: about" in refused.err


def test_quantised_checkpoint_is_refused(workspace: Path, tmp_path: Path, cli: Cli) -> None:
    bases.find(recipe.Base("demo")).load().save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "four")
    peft_adapter(BASE, tmp_path / "one", 0, r=3, target_modules=["q_proj"])
    done = cli("export", "./one", "--set", 'base.model="four"', "--merged", "out")
    assert done.code == 2
    assert "has quantised weights only; set base.model to the checkpoint that they were made from" in done.err

"""`export --gguf`: names, order of rows, types and refusals. tests/test_real_base.py asks llama.cpp itself."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from lora_align import recipe, runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors
from lora_align.console import Screen
from lora_align.demo import BASE
from lora_align.errors import UserError
from lora_align.export import ExportOptions
from lora_align.export.card import file_with_card
from lora_align.export.gguf_adapter import ARCHITECTURES, About, Layout, write
from lora_align.export.gguf_export import export_gguf
from lora_align.export.source import find_source
from lora_align.model.base_folder import hub_id
from lora_align.policy.policy import Conditioned, find_policy
from support import Cli, call, edit_manifest, peft_adapter, small_disk

ABOUT = About("name", "description", "owner/base", "0" * 64)
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def products(file: Path) -> dict[str, Matrix]:
    """Return ΔW of every weight in a GGUF file, in llama.cpp's order of rows."""
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: tensors[f"{name}.lora_b"].astype(float) @ tensors[f"{name}.lora_a"] for name in names}


def interleaved(rows: Matrix, heads: int) -> Matrix:
    """Return rows in llama.cpp's order, head by head: first of the first half, first of the second half, and so on."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 2e-3), ("q8_0", 2e-2)])
def test_gguf_holds_the_weighted_sum_in_llama_cpps_order(workspace: Path, cli: Cli, dtype: str, error: float) -> None:
    done = cli("export", "helpful=1,harmless=-0.5", "--gguf", "mix.gguf", "--dtype", dtype)
    assert done.code == 0, done.err
    signs = {"helpful/pos": 1.0, "helpful/neg": -1.0, "harmless/pos": -0.5, "harmless/neg": 0.5}
    parts = [(peft_format.load(workspace / "runs/dpo" / name), sign) for name, sign in signs.items()]
    written = products(workspace / "mix.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    config = LlamaConfig.from_pretrained(BASE)
    for module in parts[0][0]:
        dense = sum(sign * (part[module].B.double() @ part[module].A.double()).numpy() for part, sign in parts)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        expected = interleaved(dense, heads) if heads else dense
        found = written.pop(f"{names.get_name(module)}.weight")
        assert np.abs(found - expected).max() <= error * np.abs(expected).max(), module
    assert not written


def test_gguf_names_its_base_and_leaves_no_scaling_to_llama_cpp(tmp_path: Path) -> None:
    factors = {"model.layers.0.mlp.up_proj": Factors(torch.ones(6, 2), torch.ones(2, 4))}
    layout = Layout.of(LlamaConfig(num_hidden_layers=1))
    write(tmp_path / "one.gguf", factors.items(), layout, ABOUT, "float32")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "one.gguf").fields.items()}
    assert fields["adapter.lora.alpha"] == 0.0
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["general.base_model.0.organization"] == "owner"
    assert fields["general.base_model.0.name"] == "base"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/owner/base"
    assert ABOUT.fingerprint in fields["general.base_model.0.description"]


def test_modules_may_have_different_ranks(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.0.mlp.{kind}_proj": Factors(
            torch.randn(64, r, generator=made), torch.randn(r, 32, generator=made)
        )
        for kind, r in (("up", 3), ("gate", 40))
    }
    write(tmp_path / "one.gguf", modules.items(), Layout.of(LlamaConfig(num_hidden_layers=1)), ABOUT, "q8_0")
    for kind, found in ((name.split(".")[2], matrix) for name, matrix in products(tmp_path / "one.gguf").items()):
        factors = modules[f"model.layers.0.mlp.{kind.removeprefix('ffn_')}_proj"]
        expected = (factors.B.double() @ factors.A.double()).numpy()
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("base", "name"), [("./Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("/models/Qwen2.5-0.5B.Q4_1.gguf", "Qwen2.5-0.5B.Q4_1")]
)
def test_dots_stay_in_the_bases_name(base: str, name: str, tmp_path: Path) -> None:
    layout = Layout.of(LlamaConfig(num_hidden_layers=1))
    write(tmp_path / "one.gguf", [], layout, replace(ABOUT, base=base), "float32")
    field = gguf.GGUFReader(tmp_path / "one.gguf").fields["general.base_model.0.name"]
    assert field.contents() == name


def test_each_vector_gets_a_file_and_the_request_lists_every_scale(workspace: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1,harmless=-0.5", "--gguf", "vectors", "--each", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert list(result["files"]) == ["vectors/helpful.gguf", "vectors/harmless.gguf"]
    assert '"lora": [{"id": 0, "scale": 1.0}, {"id": 1, "scale": -0.5}]' in result["use"]
    assert "--lora-scaled vectors/helpful.gguf:1,vectors/harmless.gguf:-0.5" in result["use"]
    card = (workspace / "vectors/README.md").read_text()
    assert "- `harmless`: weight -0.5; its safe weights were not measured" in card
    assert "`dpo/helpful/pos` was trained on `demo:pairs" in card


def test_printed_command_passes_on_the_arguments_of_the_chat_template(workspace: Path, cli: Cli) -> None:
    setting = ("--set", 'base.chat_template_kwargs={note = "it\'s"}')
    done = cli("export", "helpful=1", "--gguf", "mix.gguf", *setting)
    assert done.code == 0, done.err
    words = shlex.split(done.out.splitlines()[-1])
    assert words[:4] == ["llama-server", "-m", "BASE.gguf", "--chat-template-kwargs"]
    assert json.loads(words[4]) == {"note": "it's"}


def test_request_of_a_conditioned_policy_has_its_system_message(workspace: Path) -> None:
    project, runs_dir, screen = recipe.load(recipe.builtin()["demo"]), workspace / "runs", Screen(quiet=True)
    run = runs.read(runs_dir / "dpo/helpful/pos")
    asked = replace(
        find_policy("helpful=1", project, runs_dir, screen), conditioned=Conditioned("helpful", run, "It's so.")
    )
    source = find_source(asked, project, runs_dir, screen)
    done = export_gguf(source, workspace / "vectors", screen, ExportOptions(each=True))
    request = json.loads(shlex.split(done.use.splitlines()[-1])[-1])
    assert request["messages"] == [
        {"role": "system", "content": "It's so."},
        {"role": "user", "content": "Hello"},
    ]


def test_each_vector_of_a_mix_gets_a_file(workspace: Path, cli: Cli) -> None:
    assert cli("merge", "-w", "helpful=0.5,harmless=1").code == 0
    done = cli("export", "runs/mix/helpful0p5_harmless1", "--gguf", "vectors", "--each", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert list(result["files"]) == ["vectors/helpful.gguf", "vectors/harmless.gguf"]
    assert '"lora": [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.0}]' in result["use"]


def test_card_of_a_mix_finds_its_vectors_from_another_folder(
    workspace: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("merge", "-w", "helpful=0.5").code == 0
    (workspace / "else").mkdir()
    words = ["export", "../runs/mix/helpful0p5", "--runs", "../runs", "--gguf", "mix.gguf"]
    done = call(workspace / "else", *words)
    assert done.code == 0, done.err
    card = (workspace / "else/mix.md").read_text()
    assert "has `helpful` with weight 0.5; its safe weights were not measured" in card
    assert "was trained on `demo:pairs" in card
    shutil.rmtree(workspace / "runs/dpo/helpful/neg")
    done = call(workspace / "else", *words[:-1], "again.gguf")
    assert done.code == 0, done.err
    assert "its adapters are not there any more" in (workspace / "else/again.md").read_text()


def test_file_is_not_published_without_its_card(workspace: Path, cli: Cli) -> None:
    size = cli("export", "helpful=1", "--gguf", "mix.gguf")
    assert size.code == 0, size.err
    pages = -(-(workspace / "mix.gguf").stat().st_size // 4096)  # of 4 KiB each: the file fits, its card does not
    with small_disk(workspace / "disk", f"{pages * 4}k") as disk:
        failed = cli("export", "helpful=1", "--gguf", "disk/mix.gguf")
        assert list(disk.iterdir()) == []
    assert failed.code == 1
    assert "No space left on device" in failed.err


def test_file_is_deleted_if_another_program_makes_its_card_meanwhile(tmp_path: Path) -> None:
    def write_both() -> None:
        with file_with_card(tmp_path / "mix.gguf") as (file, text):
            file.write_text("an adapter")
            text.write_text("its card")
            (tmp_path / "mix.md").write_text("notes")

    with pytest.raises(UserError, match=r"mix\.md"):
        write_both()
    assert [path.name for path in tmp_path.iterdir()] == ["mix.md"]
    assert (tmp_path / "mix.md").read_text() == "notes"


@pytest.mark.parametrize(
    ("base", "repository"),
    [
        ("owner/name", "owner/name"),
        ("owner/name/folder/file.gguf", "owner/name"),
        ("models/file.gguf", ""),
        ("./models/file.gguf", ""),
        ("/models/file.gguf", ""),
        ("demo", ""),
        ("owner/name/other", ""),
    ],
)
def test_hub_id_is_told_from_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, repository: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/file.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert hub_id(base) == repository


def test_export_of_a_mix_equals_that_of_its_weights(workspace: Path, cli: Cli) -> None:
    assert cli("merge", "-w", "helpful=0.5,harmless=1").code == 0
    for source, file in (("runs/mix/helpful0p5_harmless1", "one.gguf"), ("helpful=0.5,harmless=1", "two.gguf")):
        done = cli("export", source, "--gguf", file, "--dtype", "float32")
        assert done.code == 0, done.err
    one, two = (products(workspace / file) for file in ("one.gguf", "two.gguf"))
    assert one.keys() == two.keys()
    assert all(np.abs(one[name] - two[name]).max() < 1e-7 for name in one)
    card = (workspace / "one.md").read_text()
    assert "`mix/helpful0p5_harmless1` has `helpful` with weight 0.5" in card
    assert "`dpo/harmless/neg` was trained on `demo:pairs" in card


def test_vectors_whose_files_would_have_one_name_are_refused(workspace: Path, cli: Cli) -> None:
    for name in ("pos one", "pos-one"):
        shutil.copytree(workspace / "runs/dpo/helpful/pos", workspace / name)
    done = cli("export", "pos one=1,pos-one=0.5", "--gguf", "out", "--each")
    assert done.code == 2
    assert "--each: pos one and pos-one would both be written to pos-one.gguf" in done.err


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ('license: "mit"', "`mit`"),
        ("license: [mit, apache-2.0]", "`mit, apache-2.0`"),
        ("license: other\nlicense_name: llama3.1", "`llama3.1`"),
        ("tags: [a]", "not stated in its files"),
        ("license: [", "not stated in its files"),
    ],
)
def test_card_has_the_licence_in_the_metadata_of_the_bases_card(
    front: str, licence: str, workspace: Path, cli: Cli
) -> None:
    shutil.copytree(BASE, workspace / "base")
    (workspace / "base/README.md").write_text(f"---\n{front}\n---\n\nlicense: false\n\n---\n")
    done = cli("export", "helpful=1", "--gguf", "mix.gguf", "--set", 'base.model="base"')
    assert done.code == 0, done.err
    assert f"Licence: {licence}." in (workspace / "mix.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["helpful=1", "--gguf", "runs", "--each"], "--gguf: runs exists; delete it, or give another path"),
        (["helpful=1", "--gguf", "card.gguf"], "card.md exists, where the card would be; delete it, or give another"),
        (["helpful=1", "--gguf", "mix.md"], "--gguf 'mix.md': expected a file name that ends in .gguf"),
        (["helpful=1", "--gguf", ""], "--gguf '.': expected a file name that ends in .gguf"),
        (["helpful=1", "--gguf", "a,b", "--each"], "--gguf a,b: llama-server reads ',' as the end of a path"),
        (["helpful=1", "--gguf", "a,b.gguf"], "--gguf a,b.gguf: llama-server reads ',' as the end of a path"),
        (["helpful=1", "--gguf", "a:b", "--each"], "--gguf a:b: llama-server reads ':' as the end of a path"),
        (["helpful=0", "--gguf", "a.gguf"], "the weighted sum is zero: the adapter would do nothing"),
        (["helpful=nan", "--gguf", "a.gguf"], "'helpful=nan': expected NAME=NUMBER"),
        (["helpful=1", "--gguf", "no/mix.gguf"], "--gguf no/mix.gguf: there is no folder no"),
        (
            ["helpful=1", "--gguf", "a.gguf", "--dtype", "q4"],
            "--dtype 'q4': with --gguf, expected one of float16, float32, q8_0",
        ),
        (["start", "--gguf", "a.gguf"], "start: this policy has no adapter to export"),
    ],
)
def test_export_refuses(workspace: Path, cli: Cli, words: list[str], message: str) -> None:
    (workspace / "card.md").touch()
    done = cli("export", *words)
    assert done.code == 2
    assert message in done.err


def test_width_that_q8_0_cannot_divide_is_refused(tmp_path: Path) -> None:
    factors = {"model.layers.0.mlp.up_proj": Factors(torch.ones(6, 2), torch.ones(2, 48))}
    with pytest.raises(UserError, match="q8_0 needs an input width that is a multiple of 32, not 48"):
        write(tmp_path / "one.gguf", factors.items(), Layout.of(LlamaConfig(num_hidden_layers=1)), ABOUT, "q8_0")


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "phi3"])
def test_each_type_of_base_gets_llama_cpps_names_and_its_order_of_rows(kind: str, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = CONFIG_MAPPING[kind](num_hidden_layers=2, hidden_size=64, **heads)
    made = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.1.{module}": Factors(torch.randn(rows, 2, generator=made), torch.randn(2, 64, generator=made))
        for module, rows in (("self_attn.q_proj", 64), ("self_attn.k_proj", 32), ("mlp.gate_proj", 96))
    }
    write(tmp_path / "one.gguf", modules.items(), Layout.of(config), ABOUT, "float32")
    found = products(tmp_path / "one.gguf")
    dense = [(factors.B.double() @ factors.A.double()).numpy() for factors in modules.values()]
    if kind in ("llama", "mistral"):
        dense[:2] = interleaved(dense[0], 4), interleaved(dense[1], 2)
    names = ["blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_gate.weight"]
    assert found.keys() == set(names)
    for name, expected in zip(names, dense, strict=True):
        assert np.abs(found[name] - expected).max() < 1e-5, name
    architecture = gguf.GGUFReader(tmp_path / "one.gguf").fields["general.architecture"].contents()
    assert architecture == {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path, cli: Cli) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=2, n_positions=256))
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    peft_adapter(tmp_path / "base", tmp_path / "one", 0, r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    done = cli("export", "./one", "--set", 'base.model="base"', "--gguf", "out.gguf")
    assert done.code == 2
    assert "an adapter of a 'gpt2' base cannot be written as GGUF (known: llama, mistral, qwen2" in done.err
    assert not list(tmp_path.glob("*out*"))


def test_vectors_of_another_base_are_refused(workspace: Path, llama: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1", "--set", f"base.model={json.dumps(str(llama))}", "--gguf", "out.gguf")
    assert done.code == 2
    assert "the adapters were trained on the base demo (" in done.err
    assert "name their recipe with --recipe" in done.err


def test_base_that_cannot_be_fetched_is_named_with_its_download(workspace: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1", "--set", 'base.model="owner/absent"', "--merged", "out")
    assert done.code == 2
    assert "hf download owner/absent" in done.err


def test_module_that_llama_cpp_lacks_is_refused_by_name() -> None:
    tied = Layout.of(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"^lm_head cannot be exported to GGUF: its weight is that of the embeddings"):
        tied.name("lm_head")
    with pytest.raises(UserError, match=r"^model.layers.0.extra cannot be exported to GGUF: llama.cpp has no such"):
        tied.name("model.layers.0.extra")


def test_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    factors = {"model.layers.0.mlp.up_proj": Factors(torch.full((6, 2), 1e9), torch.full((2, 4), 1e9))}
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj: a value is too large for float16"):
        write(tmp_path / "a.gguf", factors.items(), Layout.of(LlamaConfig(num_hidden_layers=1)), ABOUT, "float16")


def test_card_shows_where_licences_are(workspace: Path, cli: Cli) -> None:
    edit_manifest(workspace / "runs/dpo/helpful/pos", data={"source": "owner/pairs", "rows": 9, "dropped": {}})
    done = cli("export", "helpful=1", "--gguf", "mix.gguf")
    assert done.code == 0, done.err
    card = (workspace / "mix.md").read_text()
    assert "`owner/pairs`, 9 rows; licence: https://huggingface.co/datasets/owner/pairs" in card
    assert "Licence: not stated in its files." in card

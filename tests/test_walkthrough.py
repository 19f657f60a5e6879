"""The commands as a person types them, from an empty directory to a mix one can talk to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lora_align as la
from lora_align import demo as demo_base
from lora_align.errors import UserError
from serve_support import serving
from support import COMMAND, PAIRS, Cli, Terminal, call, make_base, real_data


def test_five_commands_from_pairs_to_chat(workspace: Path) -> None:
    """The first three were run in what `workspace` is a copy of; the other two follow here."""
    merged = call(workspace, "merge", "--weights", "helpful=1,harmless=0.5")
    assert merged.code == 0, merged.err
    assert merged.out.startswith("runs/mix/helpful1_harmless0p5  rank 16")
    answer = call(workspace, "chat", "--prompt", "Tell me about rain.", "--seed", "1")
    assert answer.code == 0, answer.err
    assert answer.out.strip()
    assert "mix: runs/mix/helpful1_harmless0p5" in answer.err
    again = call(workspace, "chat", "--seed", "1", "--json", stdin="Tell me about rain.\n")
    printed = json.loads(again.out)
    assert printed["answer"] == answer.out.removesuffix("\n")
    assert printed["weights"] == {"helpful": 1.0, "harmless": 0.5}
    listed = json.loads(call(workspace, "list", "--json").out)["runs"]
    assert [run["stage"] for run in listed] == ["dpo"] * 4 + ["mix"]
    assert [p["weight"] for p in listed[-1]["parents"]] == [1.0, 0.5]
    table = call(workspace, "list").out
    assert "+1 helpful +0.5 harmless" in table
    assert table.startswith("base: demo\n\n")
    assert max(map(len, table.splitlines())) <= 80


def test_merged_mix_answers_like_its_vectors(workspace: Path) -> None:
    assert call(workspace, "merge", "--weights", "helpful=1,harmless=-0.5", "--out", "mine").code == 0
    words = ["--prompt", "Can you explain bees?", "--temperature", "0"]
    apart = call(workspace, "chat", "--weights", "helpful=1,harmless=-0.5", *words)
    whole = call(workspace, "chat", "--adapter", "mine", *words)
    assert apart.code == whole.code == 0, apart.err + whole.err
    assert apart.out == whole.out


STOCK = """
import sys, torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, out = sys.argv[1:]
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
for module in model.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(torch.arange(20, 84).view(2, 32)).logits, out)
assert "lora_align" not in sys.modules
"""


def test_mix_in_stock_peft_equals_the_dense_sum(workspace: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    from lora_align import recipe
    from lora_align.model import base as bases
    from lora_align.policy import vectors

    mixed = call(workspace, "merge", "--weights", "helpful=4,harmless=-3", "--name", "strong")
    assert mixed.code == 0, mixed.err
    words = [sys.executable, "-c", STOCK, str(demo_base.base_folder()), "runs/mix/strong", "logits.pt"]
    subprocess.run(words, cwd=workspace, check=True, timeout=120, capture_output=True)

    quantised = dict(bases.find(recipe.Base("demo")).load().named_modules())
    dense = AutoModelForCausalLM.from_pretrained(demo_base.base_folder(), dtype=torch.float32)
    added = 0.0
    for name, layer in dense.named_modules():
        if hasattr(getattr(quantised[name], "weight", None), "quant_state"):
            layer.weight.data = dequantize_4bit(
                quantised[name].weight.data, quantised[name].weight.quant_state
            ).double()
            for preference, weight in (("helpful", 4.0), ("harmless", -3.0)):
                for sign, side in ((1, "pos"), (-1, "neg")):
                    run = vectors.find(f"dpo/{preference}/{side}", workspace / "runs").load()
                    if name in run:
                        update = weight * sign * run[name].B.double() @ run[name].A.double()
                        layer.weight.data += update
                        added += float(update.norm())
            layer.weight.data = layer.weight.data.float()
    with torch.no_grad():
        expected = dense(torch.arange(20, 84).view(2, 32)).logits
    assert added > 1
    assert (torch.load(workspace / "logits.pt") - expected).abs().max() < 1e-4


def test_weights_accept_runs_and_folders(workspace: Path) -> None:
    assert call(workspace, "merge", "--weights", "helpful=1", "--out", "mine").code == 0
    by_run = call(workspace, "merge", "--weights", "dpo/helpful/pos=1,runs/dpo/helpful/neg=-1", "--name", "by-run")
    assert by_run.code == 0, by_run.err
    assert call(workspace, "merge", "--weights", "./mine=1", "--name", "by-folder").code == 0
    words = ["--prompt", "Can you explain bees?", "--temperature", "0"]
    answers = {call(workspace, "chat", "--adapter", f"runs/mix/{name}", *words).out for name in ("by-run", "by-folder")}
    assert answers == {call(workspace, "chat", "--weights", "helpful=1", *words).out}


def test_mix_contains_the_start_adapter_once(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lora-align.toml").write_text(
        "[base]\nmodel = 'demo'\n[lora]\nrank = 4\n[preferences.brief]\ndata = 'demo:pairs'\nrank = 'shorter'\n"
        "[sft]\ndata = 'demo:conversations'\nlimit = 64\nlearning_rate = 3e-3\nmax_length = 128\n"
        "[dpo]\nlimit = 64\nlearning_rate = 1e-3\nmax_length = 128\n"
    )
    early = cli("dpo", "--pref", "brief")
    assert early.code == 2
    assert "lora-align sft" in early.err
    for words in (["sft"], ["dpo", "--pref", "brief"]):
        done = cli(*words)
        assert done.code == 0, done.err
    with_start = cli("merge", "--weights", "brief=1", "--name", "whole", "--json")
    without = cli("merge", "--weights", "brief=1", "--name", "bare", "--without-start", "--json")
    assert json.loads(with_start.out)["contains_start"] is True
    assert json.loads(without.out)["contains_start"] is False
    prompt = ["--prompt", "Can you explain bees?", "--temperature", "0"]
    added = cli("chat", "--adapter", "runs/mix/bare", *prompt)
    contained = cli("chat", "--adapter", "runs/mix/whole", *prompt)
    vector = cli("chat", "--weights", "brief=1", *prompt)
    assert "start adapter: runs/sft/start, added" in added.err
    assert "start adapter: contained in " in contained.err
    assert added.out == contained.out == vector.out
    with serving(tmp_path) as server:
        answer = server.text("Can you explain bees?", model="brief=1")
        chats = [server.chat("Can you explain bees?", model=name, logprobs=True) for name in ("start", "base")]
    assert vector.out.strip().startswith(answer.strip()[:100])
    start, base = (chat["choices"][0]["logprobs"]["content"][0]["logprob"] for chat in chats)
    assert start != base
    exported = [cli("export", name, "--merged", name[-4:], "--no-check") for name in ("runs/mix/whole", "brief=1")]
    assert [done.code for done in exported] == [0, 0], exported[0].err
    files = [(tmp_path / name[-4:] / "model.safetensors").read_bytes() for name in ("runs/mix/whole", "brief=1")]
    assert files[0] == files[1]
    assert "- the start adapter: weight 1" in (tmp_path / "hole/README.md").read_text()
    project = la.Project(tmp_path / "lora-align.toml", tmp_path / "runs")
    capsys.readouterr()
    project.chat("base")
    assert "start adapter" not in capsys.readouterr().err
    by_run = cli("chat", "--adapter", "mix/whole", *prompt)
    assert by_run.out == contained.out
    compressed = cli("merge", "--weights", "brief=1", "--name", "small", "--rank", "6", "--json")
    assert json.loads((tmp_path / "runs/mix/small/adapter_config.json").read_text())["r"] == 6
    assert json.loads(compressed.out)["metrics"]["left_out"] > 0
    for words in (
        ["merge", "--weights", "mix/whole=1", "--name", "twice"],
        ["merge", "--weights", "whole=1,brief=1", "--name", "twice"],
        ["chat", "--weights", "mix/whole=1", *prompt],
    ):
        twice = cli(*words)
        assert twice.code == 2, twice.out
        assert "contains the start adapter" in twice.err
    turned = cli("chat", "--adapter", "mix/small", *prompt)
    assert turned.code == 0, turned.err
    exported = json.loads(cli("export", "brief=0.5", "--gguf", "vectors", "--each", "--json").out)
    assert list(exported["files"]) == ["vectors/brief.gguf", "vectors/start.gguf"]
    assert '"lora": [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.0}]' in exported["use"]
    assert (
        "- the start adapter: weight 1\n  - `sft/start` was trained on `demo:conversations"
        in (tmp_path / "vectors/README.md").read_text()
    )
    (tmp_path / "runs" / "sft").rename(tmp_path / "sft-elsewhere")
    alone = cli("chat", "--adapter", "mix/whole", *prompt)
    assert alone.out == contained.out
    (tmp_path / "sft-elsewhere").rename(tmp_path / "runs" / "sft")
    assert "is the start adapter" in cli("chat", "--weights", "sft/start=1", *prompt).err


def test_truncation_reports_the_lost_energy(workspace: Path) -> None:
    done = call(workspace, "merge", "--weights", "helpful=1,harmless=1", "--rank", "4", "--name", "small", "--json")
    facts = json.loads(done.out)
    assert facts["path"] == "runs/mix/small"
    assert 0 < facts["metrics"]["left_out"] < 1
    again = call(workspace, "merge", "--weights", "helpful=1,harmless=1", "--rank", "4", "--name", "again")
    assert "of its energy left out" in again.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo", "--pref", "helpfull"], "did you mean 'helpful'? (known: helpful, harmless, brief, polite"),
        (["dpo"], "give either --pref NAME or --all"),
        (["dpo", "--pref", "helpful", "--direction", "up"], "pos, neg or both"),
        (
            ["dpo", "--pref", "helpful", "--direction", "pos"],
            "--resume keeps it and trains what is missing, --force",
        ),
        (["dpo", "--pref", "helpful", "--name", "../up"], "a-z 0-9"),
        (["dpo", "--pref", "brief", "--set", "dpo.beta=-1", "--set", "dpo.x=1"], "dpo.beta"),
        (["merge", "--weights", "brief=1"], "lora-align dpo --pref brief --direction both"),
        (["merge", "--weights", "unheard=1"], "known: brief, certain, concrete, formal, harmless"),
        (["merge", "--weights", "helpful=nan"], "expected NAME=NUMBER"),
        (["merge", "--weights", "./nowhere=1"], "no adapter in nowhere"),
        (["dpo", "--pref", "brief", "--set", "lora.targets=['nothing']", *PAIRS], "cannot be trained: Target modules"),
        (["dpo", "--pref", "brief", "--set", "dpo.optimizer=foo", *PAIRS], "dpo.optimizer: no optimizer 'foo'"),
        (["dpo", "--pref", "brief", "--set", "dpo.report_to=['wandb']", *PAIRS], "requires wandb"),
        (["chat", "--prompt", " "], "the prompt is empty"),
        (["sft"], "no [sft] table"),
        (["chat", "--weights", "helpful=1", "--adapter", "x", "--prompt", "hi"], "--adapter excludes --weights"),
        (
            ["chat", "--prompt", "hi", "--set", "base.model=nobody/nothing"],
            "not in the cache and the hub cannot be reached",
        ),
        (["frobnicate"], "no command"),
        (["init", "nothing"], "no recipe 'nothing'"),
        (["recipes", "--frob"], "No such option"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(words: list[str], message: str, trained: Path) -> None:
    done = call(trained, *words)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (2 if "dpo.x=1" in words else 1)


UNREAD = {"prompt": "Hi?", "images": ["a.png"], "chosen": "Yes.", "rejected": "No, never.", "completion": "Yes."}


@pytest.mark.parametrize(
    "words",
    [
        ["dpo", "--pref", "own", "--set", 'preferences.own={data="rows.jsonl"}'],
        ["sft", "--set", 'sft.data="rows.jsonl"'],
        ["generate", "--prompts", "rows.jsonl", "--out", "a.jsonl", "--max-new-tokens", "4"],
        ["score", "--data", "rows.jsonl", "--out", "a.jsonl", "--by", "pair:helpful"],
    ],
    ids=lambda words: words[0],
)
def test_unread_columns_are_named_by_every_command(words: list[str], workspace: Path) -> None:
    (workspace / "rows.jsonl").write_text(
        "".join(json.dumps({**UNREAD, "prompt": f"Hi {i}?"}) + "\n" for i in range(9))
    )
    done = call(workspace, *words)
    assert done.code == 0, done.err
    assert "column 'images' is filled in 9 rows but not read" in done.err


def test_unconverged_runs_are_reported_by_every_command(workspace: Path) -> None:
    words = ["--pref", "helpful", "--name", "weak", "--limit", "32", "--set", "dpo.learning_rate=1e-9"]
    trained = call(workspace, "dpo", *words)
    assert trained.code == 0
    assert trained.err.count("unconverged: the adapter is tiny") == 2
    listed = json.loads(call(workspace, "list", "--json").out)["runs"]
    assert [run["unconverged"] != [] for run in listed if "weak" in run["path"]] == [True, True]
    for name, more in (("weak-mix", []), ("weak-small", ["--rank", "2"])):
        assert "unconverged: the adapter is tiny" in call(workspace, "merge", "-w", "weak=1", "--name", name, *more).err
        spoken = call(workspace, "chat", "--adapter", f"mix/{name}", "--prompt", "Hello.")
        assert spoken.code == 0, spoken.err
        assert "unconverged: the adapter is tiny" in spoken.err


def test_adapters_without_manifest_mix_beside_runs(workspace: Path) -> None:
    for side in ("pos", "neg"):
        shutil.copytree(workspace / "runs" / "dpo" / "helpful" / side, workspace / f"My {side}.v2")
        (workspace / f"My {side}.v2" / "manifest.json").unlink()
    merged = call(workspace, "merge", "--weights", "./My pos.v2=1,./My neg.v2=-1")
    assert merged.code == 0, merged.err
    assert merged.out.startswith("runs/mix/my-pos-v21_my-neg-v2m1  ")
    assert "my-pos-v21_my-neg-v2m1" in call(workspace, "list").out
    words = ["--prompt", "Can you explain bees?", "--temperature", "0"]
    spoken = call(workspace, "chat", *words)
    assert spoken.code == 0, spoken.err
    assert spoken.out == call(workspace, "chat", "--weights", "helpful=1", *words).out
    more = call(workspace, "dpo", "--pref", "brief", "--direction", "pos", "--limit", "16")
    assert more.code == 0, more.err


def test_damaged_manifest_is_skipped_with_a_warning(cli: Cli, workspace: Path) -> None:
    (workspace / "runs" / "dpo" / "helpful" / "pos" / "manifest.json").write_text("{")
    listed = cli("list")
    assert listed.code == 0
    assert "skipped" in listed.err
    assert "dpo/harmless/neg" in listed.out
    merged = cli("merge", "--weights", "helpful=1")
    assert merged.code == 2
    assert "damaged" in merged.err


def test_overrides_apply_to_a_run_s_recipe(cli: Cli, workspace: Path) -> None:
    done = cli("chat", "--weights", "helpful=1", "--prompt", "Hi.", "--set", "base.chat_template_kwargs.x=1")
    assert done.code == 0, done.err
    assert "recipe: the one stored in" in done.err
    assert "is not that of the vectors' training" in done.err
    assert cli("chat", "--prompt", "Hi.", "--set", "base.x=1").code == 2


def test_debug_prints_a_traceback_and_keeps_the_exit_code(cli: Cli) -> None:
    done = cli("--debug", "merge", "--weights", "helpful=lots")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: 'helpful=lots'")


def test_missing_direction_names_the_command_that_trains_it(cli: Cli, workspace: Path) -> None:
    (workspace / "runs" / "dpo" / "helpful" / "neg").rename(workspace / "elsewhere")
    done = cli("merge", "--weights", "helpful=1")
    assert done.code == 2
    assert "lora-align dpo --pref helpful --direction neg" in done.err


def test_changed_parent_is_refused(cli: Cli, workspace: Path) -> None:
    file = workspace / "runs" / "dpo" / "helpful" / "pos" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    done = cli("merge", "--weights", "helpful=1")
    assert done.code == 2
    assert "sha256" in done.err


def test_a_folder_of_another_base_is_refused(cli: Cli, workspace: Path, llama: Path) -> None:
    done = cli("dpo", "--pref", "brief", "--set", f"base.model={llama}", *PAIRS)
    assert done.code == 2
    assert "--runs DIR" in done.err


def test_init_refuses_a_recipe_with_faults(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[base]\nmodle = "demo"\n')
    done = cli("init", "mine.toml")
    assert done.code == 2
    assert "unknown key 'base.modle', did you mean 'base.model'?" in done.err
    assert not (tmp_path / "lora-align.toml").exists()


def test_init_copies_a_recipe(cli: Cli, tmp_path: Path) -> None:
    assert cli("init", "qwen3-8b").code == 0
    assert (tmp_path / "lora-align.toml").is_file()
    assert cli("init", "demo").code == 2
    done = cli("dpo", "--pref", "helpful")
    assert "recipe: ./lora-align.toml" in done.err
    assert "'Qwen/Qwen3-8B' is not in the cache" in done.err
    assert done.code == 2


def test_libraries_print_nothing_on_the_screen(cli: Cli, tmp_path: Path) -> None:
    done = cli("dpo", "--pref", "helpful", "--direction", "pos", *PAIRS, "--set", "dpo.limit=16")
    assert done.code == 0
    for line in done.err.splitlines():
        ours = (
            "recipe: ",
            "loading libraries and the base demo",
            "helpful reference",
            "helpful pos  ",
            "warning: helpful pos: 1 optimizer step (16 pairs): too few to learn much",
            "warning: runs/dpo/helpful/pos is unconverged",
        )
        ours += ("helpful: 16 rows to train on, 40 held out; dropped: 51 × too close, 21 × tie",)
        assert line.startswith(ours), line
    quiet = cli("dpo", "--pref", "helpful", "--direction", "neg", "-q", "--json", "--set", "dpo.limit=400")
    assert json.loads(quiet.out)["runs"][0]["direction"] == "neg"
    assert quiet.err == ""


def test_own_pairs_train_an_own_preference(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}?", "chosen": "Yes it is.", "rejected": "No."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tables = "".join(
        f'[preferences.{name}]\ndata = "pairs.jsonl"\nrank = "{rank}"\n'
        for name, rank in (("yes", "label"), ("brief", "shorter"))
    )
    (tmp_path / "lora-align.toml").write_text(f'[base]\nmodel = "demo"\n[lora]\nrank = 4\n{tables}')
    done = cli("dpo", "--all", "--direction", "pos", "--json")
    assert done.code == 0, done.err
    assert [run["path"] for run in json.loads(done.out)["runs"]] == ["runs/dpo/yes/pos", "runs/dpo/brief/pos"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_command_without_partial_results(number: int, code: int, tmp_path: Path) -> None:
    words = [str(COMMAND), "dpo", "--pref", "helpful", "--direction", "pos"]
    child = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    for line in child.stderr:
        if line.startswith("helpful pos"):
            break
    child.send_signal(number)
    assert child.wait(timeout=60) == code
    assert "no unfinished run was published" in child.stderr.read()
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob(".pos.staging"))


def test_chat_uses_the_newest_mix(workspace: Path) -> None:
    assert call(workspace, "merge", "--weights", "helpful=1,harmless=0.5").code == 0
    terminal = Terminal(workspace, "chat", "--seed", "3")
    assert "helpful=1 harmless=0.5" in terminal.wait_for("› ")
    assert "." in terminal.say("Tell me about rain.")
    os.write(terminal.screen, b"\x04")
    assert terminal.process.wait(timeout=20) == 0


def test_chat_commands_in_a_terminal(workspace: Path) -> None:
    alien = workspace / "alien"  # an adapter whose layers this base does not have
    shutil.copytree(workspace / "runs" / "dpo" / "helpful" / "pos", alien)
    (alien / "manifest.json").unlink()
    tensors = load_file(alien / "adapter_model.safetensors")
    save_file({k.replace("layers.3", "layers.9"): v for k, v in tensors.items()}, alien / "adapter_model.safetensors")
    terminal = Terminal(workspace, "chat", "--weights", "helpful=1", "--seed", "3")
    assert "helpful=1" in terminal.wait_for("› ")
    first = terminal.say("Tell me about rain.")
    assert "Rain" in first or "." in first
    assert "helpful=0.3" in terminal.say("/w helpful=0.3")
    assert "helpful=0.3 harmless=-1" in terminal.say("/w harmless=-1")
    compared = terminal.say("/compare helpful=1 | helpful=-1,harmless=1")
    assert compared.count("tokens)") == 2
    assert "helpful=0.3 harmless=-1" in terminal.say("/w")
    assert "compare takes two" in terminal.say("/compare helpful=1")
    assert "expected NAME=NUMBER" in terminal.say("/w helpful=lots")
    assert "no preference or run" in terminal.say("/w unheard=1")
    assert "made for another base" in terminal.say(f"/w {alien}=1")
    assert "helpful=0.3 harmless=-1" in terminal.say("/w")
    terminal.say("/retry")
    terminal.say("/system You are terse.")
    assert "saved 3 messages" in terminal.say("/save talk.json")
    assert "0 messages remain" in terminal.say("/undo")
    assert "/retry: there is no question" in terminal.say("/retry")
    assert "/compare" in terminal.say("/help")
    assert "no command /frob" in terminal.say("/frob")
    os.write(terminal.screen, b"/quit\n")
    assert terminal.process.wait(timeout=20) == 0
    saved = json.loads((workspace / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["weights"] == {"helpful": 0.3, "harmless": -1.0}


def test_ctrl_c_keeps_the_partial_answer_and_the_session(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = make_base(tmp_path_factory.mktemp("endless"), positions=8192)  # greedy on random weights: it never stops
    choice = ["--set", f"base.model={base}", "--temperature", "0", "--max-new-tokens", "8000"]
    terminal = Terminal(workspace, "chat", "--runs", "none", *choice)
    terminal.wait_for("› ")
    os.write(terminal.screen, b"talk\n")
    terminal.wait_for("\n")
    time.sleep(1)
    os.write(terminal.screen, b"\x03")
    assert " …" in terminal.wait_for("› ")
    assert "saved 2 messages" in terminal.say("/save partial.json")
    assert len(json.loads((workspace / "partial.json").read_text())["messages"][1]["content"]) > 20
    os.write(terminal.screen, b"\x04")
    assert terminal.process.wait(timeout=20) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gemma2"])
def test_model_families_train_merge_and_chat(family: str, cli: Cli, tmp_path: Path) -> None:
    base = make_base(tmp_path / family, family)
    # as recipes for real bases have it
    real = ("dpo.beta=0.1", "dpo.optimizer=adamw_torch_fused", "dpo.learning_rate=1e-3")
    words = [word for value in (f"base.model={base}", "dpo.limit=32", *real) for word in ("--set", value)]
    done = cli("dpo", "--pref", "brief", "--json", *words)
    assert done.code == 0, done.err
    for run in json.loads(done.out)["runs"]:
        assert run["metrics"]["first_margin"] == pytest.approx(0, abs=1e-5)
        assert run["metrics"]["relative_norm"] > 1e-4
    merged = cli("merge", "--weights", "brief=1")
    assert merged.code == 0, merged.err
    spoken = cli("chat", "--prompt", "Tell me about rain.", "--max-new-tokens", "8", "--json")
    assert spoken.code == 0, spoken.err
    assert json.loads(spoken.out)["tokens"] >= 1


def test_commands_on_a_real_base_with_real_pairs(cli: Cli, tmp_path: Path) -> None:
    pairs, base = real_data("llama-factory/dpo_en_demo.json"), real_data("stories260k")
    template = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    (tmp_path / "lora-align.toml").write_text(
        f"[base]\nmodel = '{base}'\n[preferences.good]\ndata = '{pairs}'\n[preferences.brief]\ndata = '{pairs}'\n"
        "rank = 'shorter'\n[dpo]\nlearning_rate = 1e-3\nbatch_size = 8\nmax_length = 96\n"
    )
    done = cli("dpo", "--all")
    assert done.code == 2
    assert "has no chat template" in done.err
    words = ["--set", f"base.chat_template={json.dumps(template)}"]
    done = cli("dpo", "--all", "--json", *words)
    assert done.code == 0, done.err
    for run in json.loads(done.out)["runs"]:
        data = json.loads((tmp_path / run["path"] / "manifest.json").read_text())["data"]
        assert data["rows"] + data["held_out"] + sum(data["dropped"].values()) == 300
        assert data["dropped"]["prompt too long"] > 0
        assert data["answers_truncated"] > 0
        assert run["metrics"]["first_margin"] == pytest.approx(0, abs=1e-5)
    assert cli("merge", "--weights", "good=0.5,brief=0.5").code == 0
    spoken = cli("chat", "--prompt", "Once upon a time", "--max-new-tokens", "20", "--seed", "1", *words)
    assert spoken.code == 0, spoken.err
    assert len(spoken.out.split()) > 3


def test_user_errors_have_exit_codes() -> None:
    assert UserError("x").exit_code == 2


@pytest.mark.parametrize("words", [["--help"], ["recipes"]])
def test_lists_fit_a_terminal(words: list[str], tmp_path: Path) -> None:
    narrow = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([COMMAND, *words], cwd=tmp_path, env=narrow, capture_output=True, text=True, check=True)
    shown = [line for line in done.stdout.splitlines() if not line.startswith("Usage")]
    assert max(map(len, shown)) <= 80
    assert not [line for line in shown if line.endswith("...")], "a summary is cut"

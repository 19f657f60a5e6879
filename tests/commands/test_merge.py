"""`merge` on the command line: methods, ranks, types, and adapters made by PEFT."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_align.adapters import peft_format
from lora_align.adapters.delta import total
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.merge_options import DTYPES, MergeOptions
from lora_align.commands.merge import default_name
from lora_align.errors import UserError
from support import Cli, call, fill, peft_adapter, small_disk


@pytest.fixture
def foreign(llama: Path, tmp_path: Path) -> Path:
    """Two LoRA folders as PEFT writes them, with no manifest."""
    peft_adapter(llama, tmp_path / "one", 0, r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    peft_adapter(llama, tmp_path / "two", 1, r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True)
    return tmp_path


def test_merge_of_two_peft_folders_equals_dense_addition(foreign: Path, llama: Path, cli: Cli) -> None:
    done = cli("merge", "-w", "./one=1,./two=-0.5", "--out", "mix")
    assert done.code == 0, done.err
    assert done.out.startswith("mix  rank 5, ")
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), foreign / "one", adapter_name="one")
    alone.load_adapter(str(foreign / "two"), "two")
    dense = AutoModelForCausalLM.from_pretrained(llama)
    layers = dict(alone.base_model.model.named_modules())
    for name, layer in dense.named_modules():
        for adapter, weight in (("one", 1.0), ("two", -0.5)):
            if adapter in getattr(layers[name], "lora_A", {}):
                layer.weight.data += weight * layers[name].get_delta_weight(adapter)
    mixed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), foreign / "mix")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert (mixed(ids).logits - dense(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("method", [name for name in METHODS if name != "soup"])
def test_every_method_writes_an_adapter(method: str, foreign: Path, cli: Cli) -> None:
    done = cli("merge", "-w", "./one=1,./two=-0.5", "--method", method, "--rank", "2", "--out", "mix", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert 0 < made["metrics"]["left_out"] < 1
    delta = peft_format.load(foreign / "mix")
    assert delta.rank == 2
    assert delta.norm() > 0
    if method in ("exact", "svd"):
        whole = peft_format.load(foreign / "one") - 0.5 * peft_format.load(foreign / "two")
        assert made["metrics"]["left_out"] == pytest.approx(1 - (delta.norm() / whole.norm()) ** 2, rel=1e-4)


def test_soup_is_a_mean_of_policies(workspace: Path) -> None:
    done = call(workspace, "merge", "-w", "helpful=0.75,harmless=0.25", "--method", "soup", "--name", "soup")
    assert done.code == 0, done.err
    pos = {name: peft_format.load(workspace / "runs" / "dpo" / name / "pos") for name in ("helpful", "harmless")}
    wanted = total([pos["helpful"] * 0.75, pos["harmless"] * 0.25])
    assert (peft_format.load(workspace / "runs" / "mix" / "soup") - wanted).norm() < 1e-5 * wanted.norm()
    refused = call(workspace, "merge", "-w", "helpful=1,harmless=0.5", "--method", "soup")
    assert refused.code == 2
    assert "weights must sum to 1; these sum to 1.5" in refused.err


def test_auto_rank_truncation_and_padding(foreign: Path, cli: Cli) -> None:
    weights = ("merge", "-w", "./one=1,./two=-0.5", "--json")
    whole = peft_format.load(foreign / "one") - 0.5 * peft_format.load(foreign / "two")
    auto = cli(*weights, "--rank", "auto:0.9", "--out", "auto")
    assert auto.code == 0, auto.err
    rank = peft_format.load(foreign / "auto").rank
    left_out = [sum(f.truncate(r)[2] for f in whole.values()) / whole.norm() ** 2 for r in (rank - 1, rank)]
    assert left_out[1] <= 0.1 < left_out[0]
    assert json.loads(auto.out)["metrics"]["left_out"] == pytest.approx(left_out[1], rel=1e-3)
    fit = cli(*weights, "--fit", "vllm", "--out", "fit")
    assert fit.code == 0, fit.err
    config = json.loads((foreign / "fit" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert (peft_format.load(foreign / "fit") - whole).norm() < 1e-6
    both = cli(*weights, "--fit", "vllm", "--rank", "1", "--out", "both")
    assert both.code == 0, both.err
    assert peft_format.load(foreign / "both").rank == 1
    filled = cli(*weights, "--fit", "vllm", "--rank", "2", "--out", "filled")
    assert filled.code == 0, filled.err
    made = peft_format.load(foreign / "filled")
    assert made.rank == 8
    assert {int(torch.linalg.matrix_rank(f.B @ f.A, rtol=1e-5)) for f in made.values()} <= {1, 2}, "padding is zero"


def test_chat_weighs_a_mix_that_is_no_sum_as_a_whole(workspace: Path) -> None:
    made = call(workspace, "merge", "-w", "helpful=1,harmless=0.5", "--method", "tsv", "--name", "whitened")
    assert made.code == 0, made.err
    answer = call(workspace, "chat", "--prompt", "Tell me about rain.", "--json")
    assert answer.code == 0, answer.err
    assert "made by tsv and is not a plain sum, so it is used as one adapter" in answer.err
    assert json.loads(answer.out)["weights"] == {"whitened": 1.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_the_given_one_or_that_of_the_parents(dtype: str, foreign: Path, cli: Cli) -> None:
    done = cli("merge", "-w", "./one=1", "--dtype", dtype, "--out", "mix")
    assert done.code == 0, done.err
    assert {tensor.dtype for tensor in load_file(foreign / "mix" / peft_format.WEIGHTS).values()} == {
        getattr(torch, dtype)
    }
    again = cli("merge", "-w", "./mix=2", "--out", "again")
    assert again.code == 0, again.err
    assert peft_format.Adapter(foreign / "again").dtype == getattr(torch, dtype), "not the type of the parent"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"options": ["density=1"]}, "exact has no option 'density'"),
        ({"rank": "0"}, "--rank '0': expected a whole number from 1"),
        ({"rank": "x"}, "a whole number from 1, or auto:0.99"),
        ({"rank": "auto:2"}, "--rank 'auto:2': expected a whole number"),
        ({"fit": "tgi"}, "expected one of vllm"),
        ({"dtype": "int8"}, "one of float32"),
    ],
)
def test_merge_refuses_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MergeOptions.parse(**{"method": "exact", "options": [], "rank": None, "fit": None, "dtype": None, **options})


def test_refused_merge_writes_nothing(foreign: Path, cli: Cli) -> None:
    done = cli("merge", "-w", "./one=1,./two=-0.5", "--out", "mix", "--rank", "0")
    assert done.code == 2
    assert "--rank '0': expected a whole number from 1" in done.err
    assert not (foreign / "mix").exists()


def test_bases_of_different_names_need_same_base(foreign: Path, cli: Cli) -> None:
    shutil.copytree(foreign / "two", foreign / "three")
    file = foreign / "three" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "someone/llama"}))
    words = ("merge", "-w", "./one=1,./three=-0.5", "--out", "mix")
    refused = cli(*words)
    assert refused.code == 2
    assert "add --same-base" in refused.err
    done = cli(*words, "--same-base")
    assert done.code == 0, done.err


def test_default_name_includes_rank_and_method() -> None:
    weights = {"helpful": 1.0, "./a/harmless": 0.5}
    assert default_name(weights) == "helpful1_harmless0p5"
    assert default_name(weights, MergeOptions(rank=8)) == "helpful1_harmless0p5_r8"
    assert default_name(weights, MergeOptions("ties", keep=0.99)) == "helpful1_harmless0p5_ties_auto0p99"
    many = default_name({f"preference-{i}": 1.0 for i in range(20)}, MergeOptions(rank=8))
    assert len(many) == 64
    assert many.endswith("_r8")


@pytest.mark.parametrize("weights", ["./one=1,./copy=-1", "./one=0", "./one=0.1,./copy=0.2,./third=-0.3"])
def test_merge_refuses_a_sum_that_is_zero(weights: str, foreign: Path, cli: Cli) -> None:
    for name in ("copy", "third"):
        shutil.copytree(foreign / "one", foreign / name)
    refused = cli("merge", "-w", weights, "--out", "mix")
    assert refused.code == 2
    assert "the weighted sum is zero: the adapter would do nothing" in refused.err
    done = cli("merge", "-w", f"{weights},./two=1e-3", "--out", "mix")
    assert done.code == 0, done.err


def test_merge_refuses_a_missing_parent_and_a_small_disk(foreign: Path, cli: Cli) -> None:
    refused = cli("merge", "-w", "./one=1", "--out", "nowhere/mix")
    assert refused.code == 2
    assert "--out nowhere/mix: there is no folder nowhere; make it first" in refused.err
    words = ("merge", "-w", "./one=1,./two=1", "--out", "disk/mix")
    with small_disk(foreign / "disk", "16k") as disk:
        failed = cli(*words)  # no room for the configuration and the manifest, which are not counted beforehand
        fill(disk)
        refused = cli(*words)
    assert (failed.code, refused.code) == (1, 2)
    message = r"error: disk/mix: No space left on device \(\d+ kB to write, \d+ kB free\); make room, or write .*--out"
    assert re.search(message, failed.err), failed.err
    message = (
        r"error: disk: about \d+ kB will be written, 0 kB are free; make room, or write to another disk with --out"
    )
    assert re.search(message, refused.err), refused.err


def test_far_weights_without_measurements_cause_a_warning(foreign: Path, cli: Cli) -> None:
    near = cli("merge", "-w", "./one=2,./two=-2", "--out", "near")
    assert "far beyond" not in near.err
    far = cli("merge", "-w", "./one=3,./two=-2.5", "--out", "far")
    assert far.code == 0, far.err
    for weight in ("./one=3", "./two=-2.5"):
        assert f"warning: {weight} is far beyond 1, the weight in training" in far.err

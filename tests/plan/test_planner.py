"""`plan` and `--dry-run`: weights are planned to the byte, activations within 2 % of a measured step."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from transformers import AutoConfig, LlamaConfig

from lora_align import demo as demo_base
from lora_align import recipe
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.plan import advice, estimate, planner, shapes, step_cost
from lora_align.plan import device as devices
from lora_align.plan.cards import CARDS
from lora_align.plan.device import Device, device_of
from lora_align.plan.estimate import shape_of, size
from lora_align.plan.stages import stage_of
from lora_align.plan.step_cost import Shape
from lora_align.plan.timing import peak_bytes, time_step
from lora_align.rsf import inputs
from lora_align.train import lora_trainer
from support import Cli

QUIET = Screen(quiet=True)
SMALL = ["dpo.limit=60", "dpo.tokens_per_batch=2048"]


@pytest.fixture(scope="module")
def project() -> recipe.Recipe:
    return recipe.load(recipe.builtin()["demo"], SMALL)


def test_weights_and_adapters_are_planned_to_the_byte(project: recipe.Recipe) -> None:
    [planned] = planner.plan_stages(project, ["dpo"], QUIET).as_json()["stages"]
    base = bases.find(project.base)
    policy = get_peft_model(base.load(), lora_trainer.adapter_config(project.lora, base))
    trained = sum(p.numel() * 4 for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.untyped_storage().nbytes() for p in policy.parameters() if not p.requires_grad)
    scales = 0.0
    for layer in policy.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            scales += state.absmax.nbytes + state.state2.absmax.nbytes + layer.dense.nbytes
    assert planned["bytes"]["adapters"] == trained
    assert planned["bytes"]["weights"] == pytest.approx(frozen + scales, abs=layers_rounded(policy))
    assert project.dpo.optimizer == "sgd"
    assert planned["bytes"]["optimizer"] == trained  # its gradients
    assert planned["total"] == pytest.approx(sum(planned["bytes"].values()), abs=len(planned["bytes"]))


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("adamw_torch_fused", 12), ("adamw_8bit", 6)])
def test_optimizer_bytes_include_gradients_and_moments(optimizer: str, bytes_each: int, project: recipe.Recipe) -> None:
    with_moments = replace(project, dpo=replace(project.dpo, optimizer=optimizer))
    [planned] = planner.plan_stages(with_moments, ["dpo"], QUIET).as_json()["stages"]
    assert planned["bytes"]["optimizer"] == planned["bytes"]["adapters"] / 4 * bytes_each


def layers_rounded(policy: torch.nn.Module) -> int:
    """Return the tolerance: each layer's last block of scales may be incomplete."""
    return 4 * sum(isinstance(layer, Linear4bit) for layer in policy.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_match_a_measured_step(checkpointing: bool, project: recipe.Recipe) -> None:
    project = replace(project, dpo=replace(project.dpo, gradient_checkpointing=checkpointing))
    base = bases.find(project.base)
    stage = stage_of(project, "dpo", base, QUIET)
    assert stage is not None
    planned = estimate.estimate_stage(project, base, stage, device_of(project))
    assert 1024 < sum(planned.lengths[i] for i in planned.part) <= 2048
    measured = time_step(base, stage, [stage.job.rows[i] for i in planned.part]).taken
    assert planned.cost.activations + planned.cost.logits == pytest.approx(measured, rel=0.02)


def test_time_includes_measuring_the_held_out_rows(project: recipe.Recipe) -> None:
    """They are read once for each direction, and once for the reference log-probabilities."""
    base, device, plans = bases.find(project.base), device_of(project), []  # its rate is measured once
    for held_out in (0.0, 0.5):
        of = replace(project, dpo=replace(project.dpo, held_out=held_out, limit=40))
        stage = stage_of(of, "dpo", base, QUIET)
        assert stage is not None
        plans.append(estimate.estimate_stage(of, base, stage, device))
    without, with_ = plans
    assert without.judged == 0
    assert with_.judged > with_.tokens / 2

    def forward(plan: estimate.StageEstimate) -> float:
        """Return the tokens of all forward passes; a backward pass through the frozen base counts as one, too."""
        return plan.tokens * (2 * 2 + 1) + plan.judged * (2 + 1)

    expected = forward(with_) / forward(without)
    assert with_.seconds / without.seconds == pytest.approx(expected, rel=0.15)


def test_highest_returns_peak_bytes() -> None:
    def work() -> None:
        one = torch.zeros(1000, 1000)
        two = one + 1
        del one
        (two + 1).sum()

    assert peak_bytes(work) == pytest.approx(8e6, rel=0.01)


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the C++ compiler: compiling takes too long here. `test_compiled_layers` tests it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))


def test_measured_step_determines_time_and_memory(cli: Cli, tmp_path: Path, no_compiler: None) -> None:
    axis = '[preferences.brief]\ndata = "demo:pairs?rows=200"\nrank = "shorter"\n'
    (tmp_path / "one.toml").write_text(f'[base]\nmodel = "demo"\nattention = "eager"\n{axis}')
    words = ["plan", "--measure", "--json", "--recipe", str(tmp_path / "one.toml")]
    done = cli(*words)
    assert done.code == 0, done.err
    assert "dpo: measuring a step" in done.err
    of, tune = json.loads(done.out)["stages"]
    assert (tune["stage"], tune["measured"]) == ("tune", None)
    step = of["measured"]
    assert of["rate"] * step["seconds"] == pytest.approx(of["operations_a_token"] * of["part"], rel=1e-6)
    assert of["bytes"]["activations"] + of["bytes"]["logits"] == pytest.approx(step["taken"], rel=0.1)
    compiling, kernel = of["switches"]
    assert compiling["setting"] == "dpo.compile=true"
    assert "torch.compile failed on the base" in compiling["fault"]
    assert (kernel["setting"], kernel["fault"]) == ("base.attention=sdpa", "")
    assert 0.1 < kernel["step_ratio"] < 3
    worth = 0.97 * of["seconds"]  # rounded to a second
    assert kernel["pays"] or kernel["seconds"] > worth - 1
    assert not kernel["pays"] or kernel["seconds"] < worth + 1
    refused = cli("plan", "--measure", "--card", "a100")
    assert refused.code == 2
    assert "--measure runs a step on this machine" in refused.err


def test_summary_shows_measured_figures(no_compiler: None, project: recipe.Recipe) -> None:
    assert project.rsf is not None
    few = replace(project.rsf, iterations=2, prompts=4, per_prompt=2, samples=3, bootstrap=4, limit=40)
    planned = planner.plan_stages(replace(project, rsf=few), ["rsf"], QUIET, measure=True)
    [of] = planned.as_json()["stages"]
    assert of["answers"] == 4 * 2 * 2 + 4 * 2 * 3  # first iteration + second iteration
    assert of["sampling_seconds"] > 0
    text = planned.summary()
    assert "it also samples 40 answers (about " in text
    assert "of the device's matrix rate" in text
    assert "\n--set rsf.compile=true: torch.compile failed" in text
    unmeasured = planner.plan_stages(replace(project, rsf=few), ["rsf"], QUIET).summary()
    assert "it also samples 40 answers (--measure estimates the time)" in unmeasured


@pytest.mark.parametrize("learn", ["sft", "dpo"])
def test_rsf_is_planned_with_the_longest_answers_that_it_samples(project: recipe.Recipe, learn: Any) -> None:
    assert project.rsf is not None
    tokens = {}
    for longest in (10, 20):
        few = replace(
            project.rsf, prompts=4, per_prompt=2, limit=40, max_new_tokens=longest, learn=learn, packing=False
        )
        stage = stage_of(replace(project, rsf=few), "rsf", bases.find(project.base), QUIET)
        assert stage is not None
        assert stage.assumed == f"answers of {longest} tokens are assumed, because rsf samples its rows while it runs"
        rows = [[[*row.chosen], [*row.rejected]] if learn == "dpo" else [row[0].ids] for row in stage.job.rows]
        tokens[longest] = [sum(map(len, row)) for row in rows]
    longer = [b - a for a, b in zip(tokens[10], tokens[20], strict=True)]
    requests = few.iterations * 4 * 2
    assert longer[:requests] == [10 * (2 if learn == "dpo" else 1)] * requests
    rated = 40 - len(inputs.answers_of(few, bases.find(project.base)).halves[0])
    assert longer[-rated:] == [0] * rated  # the answers of the data have their own lengths


def test_extrapolated_cost_equals_that_of_all_layers(project: recipe.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers extrapolated from two and three layers cost the same as eight layers that ran."""
    base = bases.find(project.base)
    stage = stage_of(project, "dpo", base, QUIET)
    assert stage is not None
    rows = list(stage.job.rows)[:4]

    def step(model: torch.nn.Module) -> torch.Tensor:
        loss = stage.loss(model)
        return loss.part(rows, loss.weights(rows)).loss

    config = AutoConfig.from_pretrained(base.folder)
    config.num_hidden_layers = 8
    shape = Shape(config, torch.float32, True, False, True, lora_trainer.adapter_config(project.lora, base), False)
    by_cuts = shape.cost(step)
    monkeypatch.setattr(step_cost, "CUTS", (8, 9))
    whole = shape.cost(step)
    for name, value in vars(whole).items():
        assert getattr(by_cuts, name) == pytest.approx(value, rel=0.01, abs=1e4), name


def test_8b_base_is_planned_without_its_weights(tmp_path: Path, cli: Cli) -> None:
    """The configuration and the tokenizer suffice: 8.03 billion parameters take 5.7 GB in NF4."""
    folder = tmp_path / "8b"
    shutil.copytree(demo_base.base_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    words = ["plan", "--vram", "24", "--json", "--set", f'base.model="{folder}"', "--set", "dpo.limit=60"]
    done = cli(*words, "--set", "reward.limit=60", "--set", "dpo.gradient_checkpointing=true")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["parameters"] == 8_030_261_248
    planned = next(of for of in plan["stages"] if of["stage"] == "dpo")
    assert planned["bytes"]["weights"] == pytest.approx(5.7e9, rel=0.01)
    adapter = 4 * 4 * 32 * 3 * (4096 + 14336)  # float bytes × rank × layers × MLP matrices × (in + out)
    assert planned["bytes"]["adapters"] == adapter
    assert 7e9 < planned["total"] < 12e9


def test_sharded_base_takes_its_shard_and_two_whole_layers(project: recipe.Recipe) -> None:
    base = bases.find(project.base)
    stage = stage_of(project, "dpo", base, QUIET)
    assert stage is not None
    divided = replace(project, base=replace(project.base, fsdp=True))
    cards = [Device("four", 1e12, 1e12, torch.float32, 0.0, count) for count in (1, 4)]
    (one, four), alone = (
        [estimate.estimate_stage(of, base, stage, card) for card in cards] for of in (divided, project)
    )
    model = base.load()
    linears = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    packed = sum(linear.weight.nbytes for linear in linears)
    assert one.memory == alone[0].memory == alone[1].memory
    layers = model.config.num_hidden_layers
    assert four.memory["weights"] == pytest.approx(one.memory["weights"] - packed * 3 / 4 + 2 * packed / layers)
    assert {**four.memory, "weights": 0.0} == {**one.memory, "weights": 0.0}
    assert four.seconds == alone[1].seconds == pytest.approx(one.seconds / 4)


def test_advice_shards_a_base_that_fits_no_single_card(project: recipe.Recipe) -> None:
    short = replace(project, dpo=replace(project.dpo, tokens_per_batch=256, max_length=256), lora=recipe.Lora(rank=4))
    base = bases.find(short.base)
    stage = stage_of(short, "dpo", base, QUIET)
    assert stage is not None
    *_, (_, leanest, lora) = advice._changes(stage)
    card = Device("small", 1e12, 1e12, torch.float32, 0.0)
    least = estimate.estimate_stage(short, base, stage.with_settings(lora, **vars(leanest)), card)
    planned = estimate.estimate_stage(short, base, stage, replace(card, memory=least.total - 50_000))
    assert advice.what_fits(short, base, planned).startswith(
        "it fits on 4 cards that shard the base, with --set base.fsdp=true --set dpo.gradient_checkpointing=true"
    )


def test_advice_names_the_setting_that_makes_a_stage_fit(project: recipe.Recipe) -> None:
    base = bases.find(project.base)
    stage = stage_of(project, "dpo", base, QUIET)
    assert stage is not None
    planned = estimate.estimate_stage(project, base, stage, Device("small", 1e9, 1e12, torch.float32, 0.8e9))
    assert planned.fits
    tight = Device("smaller", planned.total - 1e6, 1e12, torch.float32, 0.8e9)
    planned = estimate.estimate_stage(project, base, stage, tight)
    assert not planned.fits
    assert "it fits with --set dpo.tokens_per_batch=1024: " in advice.what_fits(project, base, planned)


def test_advice_disables_unneeded_checkpointing(project: recipe.Recipe) -> None:
    careful = replace(project, dpo=replace(project.dpo, gradient_checkpointing=True))
    [planned] = planner.plan_stages(careful, ["dpo"], QUIET, vram=24).as_json()["stages"]
    assert planned["advice"].startswith("faster, and it still fits, with --set dpo.gradient_checkpointing=false: ")
    [without] = planner.plan_stages(project, ["dpo"], QUIET, vram=24).as_json()["stages"]
    assert without["seconds"] <= planned["seconds"]
    assert not without["advice"]
    base = bases.find(project.base)
    stage = stage_of(careful, "dpo", base, QUIET)
    assert stage is not None
    roomy = estimate.estimate_stage(careful, base, stage, Device("small", 1e12, 1e12, torch.float32, 0.0))
    tight = replace(roomy, device=Device("small", roomy.total + 1e6, 1e12, torch.float32, 0.0))
    assert tight.fits
    assert not advice.faster(careful, base, tight)
    slow = replace(roomy, rate=roomy.cost.whole / 600)  # as measured: ten minutes a part
    assert slow.seconds > 3600
    assert " h " in advice.faster(careful, base, slow)


def test_every_advice_is_valid_set_options(project: recipe.Recipe) -> None:
    """Each advice consists of `--set KEY=VALUE` that the recipe accepts, even if few settings are left to change."""
    base = bases.find(project.base)
    settings = replace(project.dpo, tokens_per_batch=256, max_length=256)
    for checkpointing in (False, True):
        these = replace(project, dpo=replace(settings, gradient_checkpointing=checkpointing), lora=recipe.Lora(rank=8))
        stage = stage_of(these, "dpo", base, QUIET)
        assert stage is not None
        changes = [options for options, *_ in advice._changes(stage)]
        assert changes
        for options in changes:
            words = options.split()
            assert words[::2] == ["--set"] * (len(words) // 2)
            recipe.load(recipe.builtin()["demo"], words[1::2])
    assert changes == [" --set lora.rank=4"]
    with_moments = stage.with_settings(
        **vars(replace(settings, optimizer="adamw_torch_fused", gradient_checkpointing=True))
    )
    assert " --set dpo.optimizer=adamw_8bit --set lora.rank=4" in [
        options for options, *_ in advice._changes(with_moments)
    ]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "rsf"])
def test_dry_run_shows_recipe_lengths_and_plan_without_training(stage: str, cli: Cli, tmp_path: Path) -> None:
    more = {"dpo": ["--all"], "sft": ["--set", "sft.data=demo:conversations?rows=60"]}
    words = [stage, *more.get(stage, []), "--limit", "40", "--dry-run"]
    done = cli(*words)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert f"{stage}.limit=40  (unset)" in lines
    own = lines[1 : lines.index("")]
    assert {line.split(".")[0] for line in own} == {stage, "lora", "base"}
    assert own[0].startswith(f"{stage}.")
    assert lines[lines.index("") + 1] == "other values that differ from their defaults:"
    assert "tokens of a row" in done.out
    assert f"\n{stage}: fits" in done.out
    plan = json.loads(cli(*words, "--json").out)
    assert plan["recipe"][stage]["limit"] == 40
    [planned] = plan["stages"]
    assert sum(count for *_, count in planned["histogram"]) == planned["rows"]
    assert not list(tmp_path.glob("runs/*"))


def test_dry_run_of_a_composed_preference_plans_its_parts_pairs(cli: Cli) -> None:
    rows = []
    for pref in ("helpful", "harmless", "joint"):
        words = ["dpo", "--pref", pref, "--limit", "40", "--dry-run", "--json"]
        done = cli(*words, "--set", 'preferences.joint.of=["helpful","harmless"]')
        assert done.code == 0, done.err
        rows.append(json.loads(done.out)["stages"][0]["rows"])
    assert rows[0] + rows[1] == rows[2] == 80


def test_unknown_card_is_refused_with_the_known_cards(cli: Cli) -> None:
    done = cli("plan", "--card", "rtx-9999")
    assert (done.code, "rtx-4090" in done.err) == (2, True)


@pytest.mark.parametrize("name", ["4090", "RTX 4090", "rtx4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_card_name_is_recognised_in_any_spelling(name: str, project: recipe.Recipe) -> None:
    assert device_of(project, name) == device_of(project, "rtx-4090")


def test_cards_have_plausible_memory_and_rate(project: recipe.Recipe) -> None:
    for name, (memory, rate) in CARDS.items():
        card = device_of(project, name)
        assert (card.name, card.memory, card.rate) == (name, 1e9 * memory, 1e12 * rate)
        assert 8 <= memory <= 80
        assert 25 <= rate <= 1000
    assert device_of(project, "T4").dtype == device_of(project, "v100").dtype == torch.float16
    assert device_of(project, "l4").dtype == torch.bfloat16


PARAMETERS = {  # counted from the published weights
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_shipped_shape_has_the_published_parameter_count(name: str, count: int, project: recipe.Recipe) -> None:
    base = shapes.find(recipe.Base(name), outline=True)
    assert shapes.is_shipped(base)
    assert shape_of(project, base, project.lora, device_of(project, "4090")).parameters() == count


def test_every_built_in_recipe_has_a_shipped_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    bases_of = {recipe.load(path).base.model for name, path in recipe.builtin().items() if name != "demo"}
    assert bases_of <= PARAMETERS.keys()
    monkeypatch.setattr(shapes, "_hub_answers", lambda: True)  # as of a proxy, or for a gated base
    assert shapes.is_shipped(shapes.find(recipe.Base("Qwen/Qwen3-8B"), outline=True))
    with pytest.raises(UserError, match="is not in the cache and the hub cannot be reached"):
        shapes.find(recipe.Base("nobody/nothing"), outline=True)
    with pytest.raises(UserError, match="is not in the cache"):
        shapes.find(recipe.Base("Qwen/Qwen3-8B"), outline=False)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_plan_without_the_base_refuses_a_missing_file(stage: str) -> None:
    missing = ['preferences.harmless.data="gone.jsonl"', "preferences.harmless.skip_bad=false"]
    settings = recipe.load(recipe.builtin()["smollm2-135m"], missing)
    with pytest.raises(UserError, match=r"no data file 'gone\.jsonl'"):
        planner.plan_stages(settings, [stage], QUIET, card="4090")


@pytest.mark.parametrize(
    ("name", "stages"), [("qwen3-8b", ["dpo", "tune"]), ("paper-dpa-mistral-7b", ["dpo", "reward", "rsf", "tune"])]
)
def test_built_in_recipe_is_planned_without_files_of_its_base(name: str, stages: list[str]) -> None:
    plan = planner.plan_stages(recipe.load(recipe.builtin()[name]), planner.STAGES, QUIET, card="4090")
    assert [of.estimate.stage.name for of in plan.stages] == stages
    assert all(of.estimate.fits for of in plan.stages)
    text = plan.summary()
    assert "The base's files are not available. The plan uses the shape of this base that lora-align ships." in text
    assert text.count("without a limit): the base's tokenizer is not available") == len(stages)


def test_missing_data_is_planned_as_rows_of_maximum_length(cli: Cli) -> None:
    done = cli("plan", "--json", "--set", 'preferences.helpful.data="nobody/nothing"', "--set", "dpo.limit=10")
    assert done.code == 0, done.err
    planned = next(of for of in json.loads(done.out)["stages"] if of["stage"] == "dpo")
    project = recipe.load(recipe.builtin()["demo"], [])
    assert planned["rows"] == 10 * len(project.preferences)
    assert "not in the cache and could not be fetched" in planned["assumed"]
    assert len(planned["histogram"]) == 1


def test_sizes_below_a_gigabyte_are_shown_in_megabytes() -> None:
    assert [size(count) for count in (5.7e9, 340.12e6, 2e6, 0)] == ["5.70 GB", "340.1 MB", "2.0 MB", "0.0 MB"]
    assert size(2e6, "GB") == "<0.01 GB"


def test_small_plan_is_in_megabytes(project: recipe.Recipe) -> None:
    text = planner.plan_stages(project, ["dpo"], QUIET).summary()
    assert re.search(r"^MB  +weights  +adapters .* total$", text, re.M), text
    assert "2 passes over " in text


def test_tune_is_planned_with_dpo_settings_and_no_optimizer(project: recipe.Recipe) -> None:
    two = replace(project, preferences={name: project.preferences[name] for name in ("helpful", "harmless")})
    dpo, tune = planner.plan_stages(two, ["dpo", "tune"], QUIET).as_json()["stages"]
    assert tune["rows"] == 2 * 48
    assert tune["bytes"]["optimizer"] == 0
    assert tune["bytes"]["adapters"] == 4 * dpo["bytes"]["adapters"], "two adapters of each preference"
    base = bases.find(two.base)
    stage = stage_of(two, "tune", base, QUIET)
    assert stage is not None
    short = stage.with_settings(max_length=512)
    assert [options for options, *_ in advice._changes(short)] == [
        " --set dpo.tokens_per_batch=1024",
        " --set dpo.tokens_per_batch=512",
        " --set dpo.gradient_checkpointing=true",
        " --set dpo.tokens_per_batch=512 --set dpo.gradient_checkpointing=true",
    ]


def test_free_memory_of_a_card_counts(project: recipe.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (5e9, 24e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(devices, "matrix_rate", lambda *_: 1e12)
    device = device_of(project)
    assert (device.name, device.memory, device.dtype) == ("a card", 5e9, torch.bfloat16)

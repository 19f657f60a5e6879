"""DPO from the start policy: exact at step one, one A for all, labels switched and nothing else."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_align import recipe, runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.commands.list_runs import headline_figure
from lora_align.console import Screen
from lora_align.data.rows import Conversation, Message, Pair
from lora_align.demo import world
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.tokenise import IGNORED, TokenPair
from lora_align.policy import start_policy
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.train import dpo, lora_trainer, sft
from lora_align.train import token_rows as materials
from lora_align.train.checkpoints import Checkpoints
from lora_align.train.job import Target
from lora_align.train.reference_cache import ReferenceCache
from support import Cli, made_once

QUIET = Screen(quiet=True)


def demo(*overrides: str) -> Recipe:
    return recipe.load(recipe.builtin()["demo"], ["dpo.limit=48", "dpo.tokens_per_batch=1000", *overrides])


def tensors(run: runs.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / peft_format.WEIGHTS)


def same(a: runs.Run, b: runs.Run) -> bool:
    return all(torch.equal(tensor, tensors(b)[name]) for name, tensor in tensors(a).items())


ids = st.lists(st.integers(0, 99), min_size=1, max_size=5)


@given(ids, ids, ids)
def test_neg_swaps_labels_and_changes_nothing_else(prompt: list[int], chosen: list[int], rejected: list[int]) -> None:
    pair = TokenPair(prompt, chosen, rejected)
    assert pair.for_direction(Direction.pos) == pair
    assert pair.for_direction(Direction.neg) == TokenPair(prompt, rejected, chosen)
    assert pair.for_direction(Direction.neg).swap() == pair


ROUNDING = 1e-5  # the reference is computed once, in other batches than the trainer's
NOUGHT = pytest.approx((0, 0, 0), abs=ROUNDING)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Run]:
    both_directions = list(Direction)
    made = made_once(
        tmp_path_factory,
        "both",
        lambda folder: dpo.train_dpo(demo(), ["helpful", "brief"], both_directions, folder, QUIET),
    )
    return {f"{run.manifest.preference} {run.manifest.direction}": run for run in runs.list_runs(made)}


def test_rewards_of_the_first_step_are_zero(both: dict[str, runs.Run]) -> None:
    for run in both.values():
        first = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["chosen_reward"], first["rejected_reward"], first["margin"]) == NOUGHT
        assert first["loss"] == pytest.approx(0.6931472, abs=ROUNDING)


def test_all_directions_start_from_one_float32_adapter(both: dict[str, runs.Run]) -> None:
    assert len({run.manifest.initial_adapter for run in both.values()}) == 1
    assert all(tensor.dtype == torch.float32 for run in both.values() for tensor in tensors(run).values())


def test_both_directions_share_base_references_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()

    def counting(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def called(*args: Any, **named: Any) -> Any:
            counted[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(owner, name, called)

    counting(bases.Base, "load")
    counting(ReferenceCache, "logprobs")
    counting(materials, "read_token_pairs")
    counting(dpo, "MemoryBudget")
    monkeypatch.setattr(dpo, "held_out_margins", lambda *_: {"pairs": 0})  # which has a budget of its own
    dpo.train_dpo(demo(), ["helpful"], list(Direction), tmp_path, QUIET)
    assert counted == {"load": 1, "logprobs": 1, "read_token_pairs": 1, "MemoryBudget": 1}


def test_only_init_seed_changes_the_initial_adapter(tmp_path: Path, both: dict[str, runs.Run]) -> None:
    (reordered,) = dpo.train_dpo(demo("dpo.seed=7"), ["helpful"], [Direction.pos], tmp_path / "a", QUIET)
    (redrawn,) = dpo.train_dpo(demo("lora.init_seed=1"), ["helpful"], [Direction.pos], tmp_path / "b", QUIET)
    first = both["helpful pos"]
    assert reordered.manifest.initial_adapter == first.manifest.initial_adapter
    assert not same(reordered, first)
    assert redrawn.manifest.initial_adapter != first.manifest.initial_adapter


def test_neg_after_pos_equals_neg_alone(tmp_path: Path) -> None:
    """With the same references: computed anew beside other rows, these differ by rounding."""
    pos, neg = dpo.train_dpo(demo(), ["helpful"], list(Direction), tmp_path / "both", QUIET)
    (alone,) = dpo.train_dpo(demo(), ["helpful"], [Direction.neg], tmp_path / "alone", QUIET)
    assert same(alone, neg)
    assert not same(alone, pos)


def test_neg_equals_pos_on_swapped_columns(tmp_path: Path) -> None:
    rows = list(world.pairs(0, 80))
    switched = [
        {**row, "better_response_id": None if (b := row["better_response_id"]) is None else 1 - b} for row in rows
    ]
    made = []
    for name, direction, content in (("as-is", Direction.neg, rows), ("switched", Direction.pos, switched)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, content)))
        labels = ("preferences.helpful.rank=label:better_response_id", "preferences.helpful.margin=0")
        project = demo(f"preferences.helpful.data='{file}'", *labels)
        made += dpo.train_dpo(project, ["helpful"], [direction], tmp_path / name, QUIET)
    assert same(*made)


def test_a_preference_of_two_trains_on_both_datasets(tmp_path: Path, cli: Cli) -> None:
    project = demo('preferences.joint.of=["helpful","harmless"]', "dpo.limit=30")
    base = bases.find(project.base)
    one, other, both = (dpo.prepare(project, name, base, QUIET) for name in ("helpful", "harmless", "joint"))
    for side in ("train", "held_out"):
        rows = [list(getattr(part, side)) for part in (one, other, both)]
        assert sorted(map(repr, rows[2])) == sorted(map(repr, rows[0] + rows[1]))
    assert [row in list(one.train) for row in both.train[:6]] == [True, False] * 3
    (run,) = dpo.train_dpo(project, ["joint"], [Direction.pos], tmp_path, QUIET)
    assert run.manifest.data["rows"] == 60
    assert run.manifest.data["source"] == "demo:pairs?rows=8000 + demo:pairs?rows=8000"
    assert run.manifest.data["fingerprint"] not in (one.facts["fingerprint"], other.facts["fingerprint"])
    refused = cli("data", "--pref", "joint", "--set", 'preferences.joint.of=["helpful","harmless"]')
    assert refused.code == 2
    assert "audit each of them" in refused.err


def test_gradient_checkpointing_changes_no_result(tmp_path: Path, both: dict[str, runs.Run]) -> None:
    project = demo("dpo.gradient_checkpointing=true")
    pos, neg = dpo.train_dpo(project, ["helpful"], list(Direction), tmp_path, QUIET)
    for run in (pos, neg):
        assert run.manifest.metrics["first_margin"] == pytest.approx(0, abs=ROUNDING)
        plain = tensors(both[f"helpful {run.manifest.direction}"])
        assert all(torch.allclose(tensor, plain[name], atol=1e-6) for name, tensor in tensors(run).items())


def test_lora_dropout_is_applied(tmp_path: Path, both: dict[str, runs.Run]) -> None:
    (run,) = dpo.train_dpo(demo("lora.dropout=0.5"), ["helpful"], [Direction.pos], tmp_path, QUIET)
    assert run.manifest.metrics["first_margin"] == pytest.approx(0, abs=ROUNDING)
    assert not same(run, both["helpful pos"])


def test_directions_move_apart(both: dict[str, runs.Run]) -> None:
    pos, neg = (peft_format.load(both[f"helpful {side}"].path) for side in ("pos", "neg"))
    assert pos.cosine(neg) < 0
    assert (pos - neg).norm() > max(pos.norm(), neg.norm())


def test_run_folder_has_readable_records(both: dict[str, runs.Run]) -> None:
    run = both["helpful pos"]
    assert {file.name for file in run.path.iterdir()} - {"log.txt"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "curve.png",
        "manifest.json",
        "metrics.jsonl",
    }
    assert (run.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    data = run.manifest.data
    assert data["rows"] == 48
    assert data["dropped"]["tie"] > 0
    assert run.manifest.recipe["dpo"]["limit"] == 48
    assert set(run.manifest.metrics["held_out"]) >= {"pairs"}


def test_an_unconverged_run_is_reported(tmp_path: Path) -> None:
    (run,) = dpo.train_dpo(
        demo("dpo.learning_rate=1e-9", "dpo.held_out=0.4"), ["helpful"], [Direction.pos], tmp_path, QUIET
    )
    reasons = " ".join(run.manifest.unconverged)
    assert "tiny" in reasons
    assert dpo.unconverged({"held_out": {"pairs": 100, "accuracy": 0.55}, "relative_norm": 1.0}, 0.1)
    assert not dpo.unconverged({"held_out": {"pairs": 100, "accuracy": 0.7}, "relative_norm": 0.1}, 0.1)


@pytest.mark.parametrize("pairs", [0, 1, 3, 300])
def test_divergence_is_recognised_at_any_number_of_pairs(pairs: int) -> None:
    far = {"pairs": pairs, **({"margin": -40.0, "accuracy": 0.18 if pairs > 20 else None} if pairs else {})}
    for metrics in (
        {"held_out": far, "relative_norm": 0.01, "last_margin": -30.0},
        {"held_out": {"pairs": 0}, "relative_norm": 3.0},
    ):
        [reason] = dpo.unconverged(metrics, 0.1)
        assert reason.startswith("diverged: ")
        assert "lower learning_rate" in reason
        assert "longer" not in reason
        assert "higher" not in reason
    [reason] = dpo.unconverged(
        {"held_out": {"pairs": 100, "accuracy": 0.2, "margin": -0.1}, "relative_norm": 0.01}, 0.1
    )
    assert "worse than chance; lower learning_rate" in reason


@pytest.mark.parametrize(
    ("margin", "beta", "reason"),
    [
        (-0.9, 0.1, "diverged: "),
        (-0.9, 0.01, "diverged: "),
        (-0.2, 0.1, "the held-out margin is -0.20 on 100 pairs; lower learning_rate"),
        (0.02, 0.1, "train longer, raise learning_rate"),
    ],
)
def test_advice_on_learning_rate_follows_the_sign_of_the_margin(margin: float, beta: float, reason: str) -> None:
    held_out = {"pairs": 100, "accuracy": 0.45, "margin": margin}
    [advice] = dpo.unconverged({"held_out": held_out, "relative_norm": 0.01}, beta)
    assert reason in advice


def test_low_margin_is_reported_for_few_pairs_and_at_a_good_accuracy() -> None:
    for held_out in ({"pairs": 5, "accuracy": None}, {"pairs": 100, "accuracy": 0.8}):
        [reason] = dpo.unconverged({"held_out": {**held_out, "margin": -0.49}, "relative_norm": 0.01}, 0.1)
        assert reason == f"the held-out margin is -0.49 on {held_out['pairs']} pairs; lower learning_rate"


def test_a_diverged_run_is_reported_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = demo("dpo.learning_rate=1e3", "dpo.max_grad_norm=1e6", "dpo.limit=128", "lora.alpha=64")
    (run,) = dpo.train_dpo(wild, ["helpful"], [Direction.pos], tmp_path, QUIET)
    assert "pos diverged: " in capsys.readouterr().err
    assert headline_figure(run) == "diverged"


def test_few_held_out_pairs_give_a_note_and_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = demo("dpo.limit=16", 'preferences.helpful.data="demo:pairs?rows=100"')
    (run,) = dpo.train_dpo(few, ["helpful"], [Direction.pos], tmp_path, QUIET)
    notes = capsys.readouterr().err
    held_out = run.manifest.metrics["held_out"]
    assert 0 < held_out["pairs"] < 20
    assert held_out["accuracy"] is None
    assert "too few to judge" in held_out["note"]
    assert "accuracy" not in dpo.summary(run) + headline_figure(run)
    assert f"({held_out['pairs']} pairs: too few to judge)" in dpo.summary(run)
    assert "helpful pos: 1 optimizer step (16 pairs): too few to learn much" in notes
    assert run.manifest.metrics["norm"] > 0, "the only step is one at a rate above 0"


def test_a_not_finite_step_stops_the_run(tmp_path: Path) -> None:
    wild = demo(
        "dpo.learning_rate=1e3", "dpo.weight_decay=10", "dpo.max_grad_norm=1e9", "dpo.warmup=0", "dpo.batch_size=8"
    )
    with pytest.raises(RunFailedError, match="not finite"):
        dpo.train_dpo(wild, ["helpful"], [Direction.pos], tmp_path, QUIET)
    assert runs.list_runs(tmp_path) == []


def test_dpo_trains_over_a_frozen_sft_adapter(tmp_path: Path) -> None:
    project = replace(demo(), sft=recipe.Sft(data="demo:conversations", limit=64, learning_rate=1e-3, max_length=128))
    with pytest.raises(UserError, match="lora-align sft"):
        dpo.train_dpo(project, ["helpful"], [Direction.pos], tmp_path, QUIET)
    start = sft.train_sft(project, tmp_path, QUIET)
    held_out = start.manifest.metrics["held_out"]
    assert start.manifest.contains_start
    base = bases.find(project.base)
    model = start_policy.load(base, start)
    probe = torch.arange(20, 60).view(1, 40)
    with torch.no_grad():
        before = model(probe).logits.clone()
    references = ReferenceCache.of(base, start_policy.identity(start))
    pairs = dpo.with_references(
        dpo.prepare(project, "helpful", base, QUIET), references, model, 4096, "reference", QUIET
    )
    job = dpo.dpo_job(project.dpo, project.lora, pairs.train, base)
    unfinished = Checkpoints(tmp_path / "unfinished", {})
    trained = lora_trainer.train(job, model, Target(tmp_path, "helpful", QUIET), unfinished, tmp_path)
    assert lora_trainer.relative_size(trained.policy)[1] > 1e-4
    model = lora_trainer.unwrap(trained.policy)
    with torch.no_grad():
        assert torch.equal(model.eval()(probe).logits, before)  # the start policy has not moved
    (run,) = dpo.train_dpo(project, ["helpful"], [Direction.pos], tmp_path, QUIET)
    first = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["chosen_reward"], first["rejected_reward"], first["margin"]) == NOUGHT
    assert run.manifest.start == start.manifest.files[peft_format.WEIGHTS]["sha256"]
    assert not run.manifest.contains_start
    assert held_out["rows"] > 0
    # the reference is base and SFT together: without the start adapter the same training ends elsewhere
    (bare,) = dpo.train_dpo(demo(), ["helpful"], [Direction.pos], tmp_path / "bare", QUIET)
    assert bare.manifest.initial_adapter == run.manifest.initial_adapter
    assert not same(bare, run)
    assert isinstance(peft_format.load(run.path), LoraDelta)


def test_truncated_answers_and_dropped_prompts_are_counted() -> None:
    chat = bases.find(recipe.Base("demo")).chat
    prompt = (Message("user", "Tell me about rain."),)
    counts: Counter[str] = Counter()
    pair = Pair(prompt, "Rain falls from clouds. It feeds the rivers.", "It depends.")
    [whole] = tokenise.pairs([pair], chat, 512, counts)
    assert whole
    assert not +counts
    max_length = len(whole.prompt) + 5
    [cut] = tokenise.pairs([pair], chat, max_length, counts)
    assert cut
    assert cut.chosen == whole.chosen[:5]
    assert cut.rejected == whole.rejected[:5]
    assert counts == {"answers truncated": 1 + (len(whole.rejected) > 5)}
    assert tokenise.pairs([pair], chat, len(whole.prompt), counts) == [None]
    assert counts["prompt too long"] == 1


def test_sft_labels_only_assistant_tokens() -> None:
    chat = bases.find(recipe.Base("demo")).chat
    talk = Conversation(
        (
            Message("user", "Tell me about rain."),
            Message("assistant", "It depends."),
            Message("user", "And snow?"),
            Message("assistant", "Snow falls in winter."),
        )
    )
    [row] = tokenise.texts([talk], chat, 512, Counter(), answers_only=True)
    assert row
    learned = chat.tokenizer.decode([i for i in row.labels if i != IGNORED])
    assert learned == "It depends.<|end|>Snow falls in winter.<|end|>"
    [everything] = tokenise.texts([talk], chat, 512, Counter(), answers_only=False)
    assert everything
    assert everything.labels == everything.ids == row.ids

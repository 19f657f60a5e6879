"""`tune`: its gradient against finite differences, its bounds, and the weights it finds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_align import recipe
from lora_align.console import Screen
from lora_align.errors import RunFailedError
from lora_align.evaluate import tune, tune_objective
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.test_set import read_test_set
from lora_align.evaluate.tune_objective import KL, LOSS, Bounds, TuneObjective
from lora_align.mix_weights import parse_weights
from lora_align.model import base as bases
from lora_align.model.logprobs import Answered, Reader
from lora_align.model.mixer import Mixer
from lora_align.policy.policy import weighted
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Dpo
from support import Cli

QUIET = Screen(quiet=True)
FEW = ["eval.count=8", "eval.pairs=10", "eval.max_new_tokens=40", "dpo.limit=240"]
AIMS = {"helpful": 0.6, "harmless": 0.4}


@pytest.fixture
def evaluator(workspace: Path) -> Evaluator:
    return evaluator_of("helpful=1,harmless=1", workspace)


def evaluator_of(vectors: str, workspace: Path, settings: list[str] = FEW, aims: Iterable[str] = AIMS) -> Evaluator:
    project, runs_dir = recipe.load(recipe.builtin()["demo"], settings), workspace / "runs"
    policy = weighted(parse_weights(vectors), project, runs_dir)
    policies = PolicySet.of([policy], project, bases.find(project.base), runs_dir, QUIET)
    return Evaluator(policies, read_test_set(project, QUIET, aims), runs_dir / "eval")


@pytest.mark.parametrize(
    ("vectors", "weights"),
    [("helpful=1,harmless=1", [-3.0, 2.0]), ("helpful@0-1=1,helpful@2-3=1,harmless=1", [-3.0, -2.0, 2.0])],
)
def test_gradient_equals_finite_differences(vectors: str, weights: list[float], workspace: Path) -> None:
    evaluator, here, step = evaluator_of(vectors, workspace), torch.tensor(weights), 0.05
    free = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0)
    figures = TuneObjective(evaluator, AIMS, free, Dpo()).at(here).figures
    assert figures[LOSS] > 5e-4
    objective = TuneObjective(
        evaluator, AIMS, replace(free, kl=figures[KL] / 1.5, loss=figures[LOSS] / 1.5), Dpo()
    )  # both penalties are active
    result = objective.at(here)
    rounding = 0.01 * float(result.gradient.norm()) if "@" in vectors else 0.0  # the lower layers have almost no effect
    for slope, offset in zip(result.gradient.tolist(), torch.eye(len(weights)) * step, strict=True):
        expected = (objective.at(here + offset).value - objective.at(here - offset).value) / (2 * step)
        assert slope == pytest.approx(expected, rel=0.02, abs=rounding)


def test_objective_at_zero_weights_is_that_of_the_start_policy(evaluator: Evaluator) -> None:
    objective = TuneObjective(evaluator, AIMS, Bounds(kl=0.1, loss=0.1, refused=0.0, weight=9.0), Dpo())
    zero = objective.at(torch.zeros(2))
    assert zero.value == pytest.approx(0.5, abs=1e-4)  # each pair is preferred with probability 0.5
    assert zero.figures == pytest.approx(dict.fromkeys(zero.figures, 0.0), abs=1e-5)


def test_maximise_finds_higher_value_than_scaled_weights(evaluator: Evaluator) -> None:
    bounds = Bounds(kl=5e-5, loss=0.05, refused=1.0, weight=9.0)
    objective = TuneObjective(evaluator, AIMS, bounds, Dpo())
    result, _ = tune.maximise(objective, lambda *_: None)
    assert result.value > 0.5
    assert 0.5 * bounds.kl < result.figures[KL] < 1.2 * bounds.kl, "KL is the active bound"
    for scale in (0.5, 0.8, 1.25, 2.0):
        assert objective.at(scale * result.weights).value < result.value + 0.01
    flipped = objective.at(result.weights * torch.tensor([1.0, -1.0]))
    assert flipped.value < result.value


def test_maximise_fixes_a_weight_at_its_bound(evaluator: Evaluator) -> None:
    objective = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=0.3), Dpo())
    result, _ = tune.maximise(objective, lambda *_: None)
    assert result.weights.abs().max() == pytest.approx(0.3)
    assert (result.gradient * result.weights).min() > 0, "the gradient points beyond the bound"


@pytest.mark.parametrize(("name", "weight"), [(KL, 4.0), (LOSS, -4.0)])
def test_within_bounds_scales_weights_back_to_a_passed_bound(evaluator: Evaluator, name: str, weight: float) -> None:
    far = torch.tensor([weight, weight])  # this direction passes the bound
    free = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0)
    bound = TuneObjective(evaluator, AIMS, free, Dpo()).at(far).figures[name] / 3
    assert bound > 0
    objective = TuneObjective(evaluator, AIMS, replace(free, **{{KL: "kl", LOSS: "loss"}[name]: bound}), Dpo())
    there = objective.at(far)
    assert objective.excess(there) == pytest.approx(3)
    back = tune.within_bounds(objective, there)
    assert 0.8 * bound < back.figures[name] <= bound
    assert back.weights[0] == back.weights[1]
    assert tune.within_bounds(objective, back) is back


def test_tune_shrinks_weights_until_refusals_are_within_the_bound(workspace: Path) -> None:
    """Use risky prompts as safe ones, because these vectors refuse no safe prompts."""
    settings = [*FEW, 'eval.prompts="demo:prompts?risky=1"', "eval.count=24"]
    evaluator = evaluator_of("harmless=1", workspace, settings, ["harmless"])
    far = {"kl": 99.0, "loss": 99.0, "weight": 4.0}

    def tuned(refused: float) -> tune.Tuned:
        return tune.search_weights(evaluator, {"harmless": 1.0}, Bounds(refused=refused, **far), Dpo(), QUIET)

    free, start = tuned(1.0), tune.share_refused(evaluator, {})
    more = 0.5 * (free.refused - start)
    bounded = tuned(more)
    assert more > 0
    assert bounded.refused <= start + more + 1e-9
    assert 0 < bounded.weights["harmless"] < free.weights["harmless"]
    with pytest.raises(RunFailedError, match=r"\(\d+% at the smallest, -\d+% allowed\); raise --refused"):
        tuned(-1.0)


def test_mixer_set_replaces_steered_weights(evaluator: Evaluator) -> None:
    model, updates = evaluator.model, dict(evaluator.policies.mixer.updates)
    evaluator.policies.mixer.remove()
    mixer = Mixer(model, updates, {})
    reader, rows = Reader.unchecked(model), [([5, 6, 7], [8, 9, 10])]
    with torch.no_grad():
        before = reader.tokens(rows)
        mixer.set({"helpful": 2.0})
        set_to = reader.tokens(rows)
        mixer.steer({"helpful": torch.tensor(2.0)})
        assert torch.equal(reader.tokens(rows), set_to)
        mixer.set({})
        assert torch.equal(reader.tokens(rows), before)
        mixer.steer({"harmless": torch.tensor(2.0)})
        mixer.set({"helpful": 2.0})
        assert torch.equal(reader.tokens(rows), set_to)
    assert not torch.equal(before, set_to)


def test_tune_prints_a_merge_command_with_weights_within_bounds(workspace: Path, cli: Cli) -> None:
    words = ["tune", "--aim", "helpful=3,harmless=2", "--kl", "4e-6", "--json"]
    words += [word for setting in FEW for word in ("--set", setting)]
    done = cli(*words)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert set(result["weights"]) == {"helpful", "harmless"}
    assert 2e-6 < result["kl"] <= 4e-6
    assert all(0.5 <= share <= 1 for share in result["preferred"].values())
    printed = cli(*words[: -1 - 2 * len(FEW)], *words[-2 * len(FEW) :])
    named = ",".join(f"{name}={weight:g}" for name, weight in result["weights"].items())
    assert printed.out.splitlines()[-1] == f"next: lora-align merge --weights {named}"
    assert cli("merge", "--weights", named).code == 0


def test_tune_warns_of_bounds_without_data(workspace: Path, cli: Cli) -> None:
    nothing = ['eval.prompts=""', 'eval.risky=""', 'eval.text=""']
    done = cli(
        "tune", "--aim", "helpful=1", "--json", *(word for setting in (*FEW, *nothing) for word in ("--set", setting))
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["refused"], result["loss"]) == (None, None)
    assert "eval.prompts names no safe prompts: refusals of safe prompts are not checked" in done.err
    assert "eval.text names no ordinary text: the loss on ordinary text is not checked" in done.err


def test_preferred_shares_are_counted_over_pairs(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0)
    assert TuneObjective(evaluator, AIMS, bounds, Dpo()).at(torch.zeros(2)).preferred == {}, "too few pairs to judge"
    monkeypatch.setattr(tune_objective, "MIN_HELD_OUT", 1)
    objective = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), Dpo())
    odds = evaluator.pair_log_ratios(evaluator.policies.policies[0].at({"helpful": 1.0, "harmless": -0.5}))
    result = objective.at(torch.tensor([1.0, -0.5])).preferred
    assert result == {name: float((odds[name] > evaluator.start_log_ratios[name]).float().mean()) for name in AIMS}
    assert len(set(result.values())) == 2


def test_tune_groups_gives_each_group_of_layers_a_weight(workspace: Path, cli: Cli) -> None:
    words = ["tune", "--aim", "helpful=1", "--groups", "2", "--json"]
    done = cli(*words, *(word for setting in FEW for word in ("--set", setting)))
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert set(result["weights"]) == {"helpful@0-1", "helpful@2-3"}
    assert result["preferred"] == {}, "few pairs"
    named = ",".join(f"{name}={weight:g}" for name, weight in result["weights"].items())
    assert cli("merge", "--weights", named).code == 0


def test_tune_refuses_a_share_below_0(workspace: Path, cli: Cli) -> None:
    done = cli("tune", "--aim", "helpful=-1")
    assert done.code == 2
    assert "--aim: a share must be above 0" in done.err


def test_gradient_is_unchanged_after_out_of_memory(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, here = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), torch.tensor([0.5, 0.5])
    expected = TuneObjective(evaluator, AIMS, bounds, Dpo()).at(here)
    objective = TuneObjective(evaluator, AIMS, bounds, Dpo(tokens_per_batch=2048))
    read_tokens = Reader.tokens

    def tokens(self: Reader, rows: Sequence[Answered]) -> torch.Tensor:
        if sum(len(prompt) + len(answer) for prompt, answer in rows) > 300 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return read_tokens(self, rows)

    monkeypatch.setattr(Reader, "tokens", tokens)
    result = objective.at(here)
    assert objective.budget.size == 256
    assert result.value == pytest.approx(expected.value, abs=1e-5)
    assert result.gradient.tolist() == pytest.approx(expected.gradient.tolist(), abs=1e-5)


def test_gradient_is_unchanged_with_checkpointing(evaluator: Evaluator) -> None:
    bounds, here = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), torch.tensor([0.5, 0.5])
    plain = TuneObjective(evaluator, AIMS, bounds, Dpo()).at(here)
    checkpointed = TuneObjective(evaluator, AIMS, bounds, Dpo(gradient_checkpointing=True)).at(here)
    assert checkpointed.gradient.tolist() == pytest.approx(plain.gradient.tolist(), abs=1e-6)
    assert not evaluator.model.training


def test_rows_are_truncated_at_max_length(evaluator: Evaluator) -> None:
    objective = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), Dpo(max_length=32))
    rows = [row for of in (*objective.pairs.values(), objective.answers, objective.texts) for row in of.rows]
    assert rows
    assert max(len(prompt) + len(answer) for prompt, answer in rows) <= 32

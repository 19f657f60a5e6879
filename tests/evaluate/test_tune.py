"""`tune`: its slope against finite differences, its bounds, and what is found beside a search of every place."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_align import recipe
from lora_align.console import Screen
from lora_align.errors import RunFailedError
from lora_align.evaluate import tune
from lora_align.evaluate.measure import Evaluator
from lora_align.evaluate.test_set import read_test_set
from lora_align.evaluate.tune_objective import KL, LOSS, Bounds, TuneObjective
from lora_align.model import base as bases
from lora_align.model.logprobs import Answered, Reader
from lora_align.model.mixer import Mixer
from lora_align.policy.policy import weighted
from lora_align.policy.policy_set import PolicySet
from lora_align.recipe import Dpo
from lora_align.weights import parse_weights
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
def test_the_slope_is_that_of_finite_differences(vectors: str, weights: list[float], workspace: Path) -> None:
    evaluator, here, step = evaluator_of(vectors, workspace), torch.tensor(weights), 0.05
    free = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0)
    passed = TuneObjective(evaluator, AIMS, free, Dpo()).at(here).found
    assert passed[LOSS] > 5e-4
    hill = TuneObjective(
        evaluator, AIMS, replace(free, kl=passed[KL] / 1.5, loss=passed[LOSS] / 1.5), Dpo()
    )  # both push back
    found = hill.at(here)
    rounding = 0.01 * float(found.slope.norm()) if "@" in vectors else 0.0  # the lower layers alone do next to nothing
    for slope, aside in zip(found.slope.tolist(), torch.eye(len(weights)) * step, strict=True):
        rise = (hill.at(here + aside).height - hill.at(here - aside).height) / (2 * step)
        assert slope == pytest.approx(rise, rel=0.02, abs=rounding)


def test_at_no_weights_it_is_the_start_policy(evaluator: Evaluator) -> None:
    hill = TuneObjective(evaluator, AIMS, Bounds(kl=0.1, loss=0.1, refused=0.0, weight=9.0), Dpo())
    nowhere = hill.at(torch.zeros(2))
    assert nowhere.height == pytest.approx(0.5, abs=1e-4)  # a coin decides every pair
    assert nowhere.found == pytest.approx(dict.fromkeys(nowhere.found, 0.0), abs=1e-5)


def test_what_is_climbed_to_lies_higher_than_places_around_it(evaluator: Evaluator) -> None:
    bounds = Bounds(kl=5e-5, loss=0.05, refused=1.0, weight=9.0)
    hill = TuneObjective(evaluator, AIMS, bounds, Dpo())
    found, _ = tune.climbed(hill, lambda *_: None)
    assert found.height > 0.5
    assert 0.5 * bounds.kl < found.found[KL] < 1.2 * bounds.kl, "it is what stops the climb"
    for turn in (0.5, 0.8, 1.25, 2.0):
        assert hill.at(turn * found.weights).height < found.height + 0.01
    flipped = hill.at(found.weights * torch.tensor([1.0, -1.0]))
    assert flipped.height < found.height


def test_a_weight_stays_at_its_bound_while_others_climb(evaluator: Evaluator) -> None:
    hill = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=0.3), Dpo())
    found, _ = tune.climbed(hill, lambda *_: None)
    assert found.weights.abs().max() == pytest.approx(0.3)
    assert (found.slope * found.weights).min() > 0, "they would go on"


@pytest.mark.parametrize(("name", "weight"), [(KL, 4.0), (LOSS, -4.0)])
def test_what_has_passed_a_bound_comes_back(evaluator: Evaluator, name: str, weight: float) -> None:
    far = torch.tensor([weight, weight])  # the way on which that bound is passed
    free = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0)
    bound = TuneObjective(evaluator, AIMS, free, Dpo()).at(far).found[name] / 3
    assert bound > 0
    hill = TuneObjective(evaluator, AIMS, replace(free, **{{KL: "kl", LOSS: "loss"}[name]: bound}), Dpo())
    there = hill.at(far)
    assert hill.beyond(there) == pytest.approx(3)
    back = tune.within(hill, there)
    assert 0.8 * bound < back.found[name] <= bound
    assert back.weights[0] == back.weights[1]
    assert tune.within(hill, back) is back


def test_weights_go_back_until_no_more_is_refused_than_allowed(workspace: Path) -> None:
    """Risky prompts stand in for safe ones, as these vectors leave safe ones alone."""
    settings = [*FEW, 'eval.prompts="demo:prompts?risky=1"', "eval.count=24"]
    evaluator = evaluator_of("harmless=1", workspace, settings, ["harmless"])
    far = {"kl": 99.0, "loss": 99.0, "weight": 4.0}

    def found(refused: float) -> tune.Tuned:
        return tune.tune_weights(evaluator, {"harmless": 1.0}, Bounds(refused=refused, **far), Dpo(), QUIET)

    free, start = found(1.0), tune.share_refused(evaluator, {})
    more = 0.5 * (free.refused - start)
    held = found(more)
    assert more > 0
    assert held.refused <= start + more + 1e-9
    assert 0 < held.weights["harmless"] < free.weights["harmless"]
    with pytest.raises(RunFailedError, match="--refused allows more"):
        found(-1.0)


def test_weights_that_are_steered_are_forgotten_when_others_are_set(evaluator: Evaluator) -> None:
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


def test_the_command_names_weights_within_bounds(workspace: Path, cli: Cli) -> None:
    words = ["tune", "--aim", "helpful=3,harmless=2", "--kl", "4e-6", "--json"]
    words += [word for setting in FEW for word in ("--set", setting)]
    done = cli(*words)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found["weights"]) == {"helpful", "harmless"}
    assert 2e-6 < found["kl"] <= 4e-6
    assert all(0.5 <= share <= 1 for share in found["preferred"].values())
    told = cli(*words[: -1 - 2 * len(FEW)], *words[-2 * len(FEW) :])
    named = ",".join(f"{name}={weight:g}" for name, weight in found["weights"].items())
    assert told.out.splitlines()[-1] == f"lora-align merge --weights {named}"
    assert cli("merge", "--weights", named).code == 0


def test_what_the_recipe_names_nothing_for_is_not_held_to_and_said(workspace: Path, cli: Cli) -> None:
    nothing = ['eval.prompts=""', 'eval.risky=""', 'eval.text=""']
    done = cli("tune", "--aim", "helpful=1", "--json", *(word for said in (*FEW, *nothing) for word in ("--set", said)))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["refused"], found["loss"]) == (None, None)
    assert "eval.prompts names no safe prompts: how many of them are refused is not looked at" in done.err
    assert "eval.text names no ordinary text: its loss is not looked at" in done.err


def test_what_is_told_as_preferred_was_counted(evaluator: Evaluator) -> None:
    hill = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), Dpo())
    likes, before = (
        evaluator.likes(evaluator.policies.policies[0].at({"helpful": 1.0, "harmless": -0.5})),
        evaluator.start_likes,
    )
    found = hill.at(torch.tensor([1.0, -0.5])).preferred
    assert found == {name: float((likes[name] > before[name]).float().mean()) for name in AIMS}
    assert len(set(found.values())) == 2


def test_stretches_of_layers_have_weights_of_their_own(workspace: Path, cli: Cli) -> None:
    words = ["tune", "--aim", "helpful=1", "--groups", "2", "--json"]
    done = cli(*words, *(word for setting in FEW for word in ("--set", setting)))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found["weights"]) == {"helpful@0-1", "helpful@2-3"}
    assert set(found["preferred"]) == {"helpful"}
    assert found["preferred"]["helpful"] > 0.5
    named = ",".join(f"{name}={weight:g}" for name, weight in found["weights"].items())
    assert cli("merge", "--weights", named).code == 0


@pytest.mark.parametrize(
    ("aim", "says"),
    [
        ("helpful=-1", "--aim: shares above 0"),
        ("brief=1", "brief is not trained"),
        ("helpfull=1", "did you mean 'helpful'?"),
        ("helpful", "helpful"),
    ],
)
def test_what_cannot_be_aimed_at_is_refused(workspace: Path, cli: Cli, aim: str, says: str) -> None:
    done = cli("tune", "--aim", aim)
    assert done.code == 2
    assert says in done.err


def test_memory_that_runs_out_halves_the_parts_and_the_slope_is_what_it_was(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds, here = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), torch.tensor([0.5, 0.5])
    expected = TuneObjective(evaluator, AIMS, bounds, Dpo()).at(here)
    hill = TuneObjective(evaluator, AIMS, bounds, Dpo(tokens_per_batch=2048))
    whole = Reader.tokens

    def tokens(self: Reader, rows: Sequence[Answered]) -> torch.Tensor:
        if sum(len(prompt) + len(answer) for prompt, answer in rows) > 300 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, rows)

    monkeypatch.setattr(Reader, "tokens", tokens)
    found = hill.at(here)
    assert hill.room.size == 256
    assert found.height == pytest.approx(expected.height, abs=1e-5)
    assert found.slope.tolist() == pytest.approx(expected.slope.tolist(), abs=1e-5)


def test_checkpointing_leaves_the_slope_as_it_was(evaluator: Evaluator) -> None:
    bounds, here = Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), torch.tensor([0.5, 0.5])
    plain = TuneObjective(evaluator, AIMS, bounds, Dpo()).at(here)
    anew = TuneObjective(evaluator, AIMS, bounds, Dpo(gradient_checkpointing=True)).at(here)
    assert anew.slope.tolist() == pytest.approx(plain.slope.tolist(), abs=1e-6)
    assert not evaluator.model.training


def test_pairs_are_cut_at_the_length_of_training(evaluator: Evaluator) -> None:
    hill = TuneObjective(evaluator, AIMS, Bounds(kl=9.0, loss=9.0, refused=1.0, weight=9.0), Dpo(max_length=32))
    rows = [row for of in (*hill.pairs.values(), hill.drawn) for row in of.rows]
    assert rows
    assert max(len(prompt) + len(answer) for prompt, answer in rows) <= 32

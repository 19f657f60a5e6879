"""Curves at equal KL: interpolation within a curve, intervals, verdicts; prompted policies and their strength."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_align import recipe
from lora_align.console import Screen
from lora_align.data.rows import Message, with_system_prompt, without_system_prompt
from lora_align.errors import UserError
from lora_align.evaluate.equal_kl import AtEqualKL, Curve, Difference, compare_at_equal_kl, scaled
from lora_align.evaluate.goals import GoalScore
from lora_align.evaluate.measure import Measurement
from lora_align.model import base as bases
from lora_align.model.batch_sampling import Guide, LocalSampler
from lora_align.model.logprobs import guided_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import Policy, find_policy
from support import Cli

FEW = ["eval.count=6", "eval.samples=1", "eval.pairs=6", "eval.max_new_tokens=20"]
SMALL = [word for setting in FEW for word in ("--set", setting)]


def measured(kl: float, words: Callable[[int], float], prompts: int = 40) -> Measurement:
    """Return a policy whose answers have the same KL, and some words by prompt."""
    answers = [
        {"prompt": i, "kind": "", "answer": "a b", "words": words(i), "kl": kl, "tokens": 10, "refused": False}
        | {"ended": True, "repeated": 0.0}
        for i in range(prompts)
    ]
    return Measurement("", answers, [], [], [])


def curve(name: str, points: dict[float, tuple[float, float]], noise: float = 0.0) -> Curve:
    """Return a curve of scale → (KL, words), with noise between prompts."""
    draw = random.Random(name)
    noises = [noise * draw.gauss(0, 1) for _ in range(40)]
    return Curve.of(
        name, {scale: measured(kl, lambda i, w=words: w + noises[i]) for scale, (kl, words) in points.items()}
    )


def test_rival_is_interpolated_at_the_kl_of_the_policy() -> None:
    ours = curve("brief", {0.0: (0.0, 80.0), 1.0: (3.0, 20.0)})
    rival = curve("prompt", {0.0: (0.0, 80.0), 1.0: (2.0, 60.0), 2.0: (6.0, 40.0)})
    [one] = compare_at_equal_kl(ours, rival)
    assert one.policy == "brief=1"
    assert one.kl == pytest.approx({"KL": 3.0, "KL per token": 0.3})
    for kind in ("KL", "KL per token"):
        found = one.figures[kind]["words"]
        assert (found.policy, found.rival) == pytest.approx((20.0, 55.0))  # a quarter of the way from 60 to 40
        assert (found.low, found.high) == pytest.approx((-35.0, -35.0))
    assert one.verdict(GoalScore("words", lower=True)) == "better"
    assert one.verdict(GoalScore("words")) == "worse"


def test_rival_is_never_extrapolated() -> None:
    ours = curve("brief", {0.0: (0.0, 80.0), 1.0: (9.0, 20.0)})
    [one] = compare_at_equal_kl(ours, curve("prompt", {0.0: (0.0, 80.0), 2.0: (6.0, 40.0)}))
    assert one.figures == {"KL": {}, "KL per token": {}}
    assert "does not reach this KL" in one.verdict(GoalScore("words"))


def test_noise_between_prompts_makes_a_small_difference_undecided() -> None:
    ours = curve("brief", {0.0: (0.0, 80.0), 1.0: (3.0, 50.0)}, noise=40.0)
    rival = curve("prompt", {0.0: (0.0, 80.0), 1.0: (4.0, 46.0)}, noise=40.0)
    [one] = compare_at_equal_kl(ours, rival)
    found = one.figures["KL"]["words"]
    assert found.low < found.policy - found.rival < found.high
    assert one.verdict(GoalScore("words", lower=True)) == "undecided"


def test_verdict_must_hold_for_both_kinds_of_kl() -> None:
    ahead, level = Difference(2.0, 1.0, 0.5, 1.5), Difference(2.0, 1.9, -0.5, 0.7)
    one = AtEqualKL("a=1", "b", {}, {}, {"KL": {"score": ahead}, "KL per token": {"score": level}})
    assert one.verdict(GoalScore("score")) == "undecided"


def test_prompts_and_weights_have_a_scale() -> None:
    project, runs_dir = recipe.load(recipe.builtin()["demo"]), Path("runs")
    prompt = find_policy("prompt@2:Be brief: no more.", project, runs_dir, Screen(quiet=True))
    assert (prompt.system, prompt.strength) == ("Be brief: no more.", 2.0)
    assert scaled(prompt, 0.5) == "prompt@1:Be brief: no more."
    assert scaled(Policy("x", weights={"a": 1.0, "b": -0.5}), 2) == "a=2,b=-1"
    with pytest.raises(UserError, match="only weights, adapters and prompts have a scale"):
        scaled(Policy("start"), 1.0)


@pytest.mark.parametrize("name", ["prompt:", "prompt: ", "prompt@x:Be brief.", "prompt@-1:Be brief.", "prompt@nan:a"])
def test_malformed_prompts_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"expected prompt:TEXT or prompt@STRENGTH:TEXT, with a strength from 0 to 10"):
        find_policy(name, recipe.load(recipe.builtin()["demo"]), Path("runs"), Screen(quiet=True))


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_system_prompt_is_removed_again(system: str) -> None:
    prompt = with_system_prompt(system, (Message("user", "Hello"),))
    assert without_system_prompt("Be brief.", with_system_prompt("Be brief.", prompt)) == prompt


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7])
def test_guided_answers_and_logprobs_equal_those_of_summed_logits(strength: float) -> None:
    base = bases.find(recipe.Base("demo"))
    model, guide = base.load(), Guide("Your response should be rated helpfulness 0.9", strength)
    questions = [(Message("user", text),) for text in ("Tell me about rain.", "I am new. Teach me about soup.")]
    asked = [with_system_prompt(guide.system, question) for question in questions]
    sampler = LocalSampler(model, base, guide=guide)
    sampled = [one for batch in sampler.draw(asked, 2, Sampling(0.0, 1.0, 30)) for one in batch]
    assert len(sampled) == 4
    rows, plain, expected = [], [], []
    for one in sampled:
        contexts = [base.chat.prompt_ids(of[one.prompt]) for of in (asked, questions)]
        tokens, total = list[int](), 0.0
        while len(tokens) < 30 and (not tokens or tokens[-1] not in base.chat.stop_ids):
            with_, without = (model(torch.tensor([[*ids, *tokens]])).logits[0, -1].double() for ids in contexts)
            logprobs = (strength * with_ + (1 - strength) * without).log_softmax(-1)
            tokens.append(int(logprobs.argmax()))
            total += float(logprobs.max())
        assert list(one.ids) == tokens
        rows.append((contexts[0], [tokens]))
        plain.append((contexts[1], [tokens]))
        expected.append(total)
    found = guided_logprobs(model, rows, plain, strength, MemoryBudget(64))
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_eval_measures_a_prompted_policy(workspace: Path, cli: Cli) -> None:
    asked = "Your response should be rated helpfulness 0.9"
    names = [f"prompt:{asked}", f"prompt@1:{asked}", f"prompt@0:{asked}", f"prompt@2:{asked}"]
    done = cli("eval", *names, "--json", *SMALL)
    assert done.code == 0, done.err
    figures: dict[str, Any] = json.loads(done.out)["policies"]
    kl = [figures[name]["KL"]["value"] for name in names]
    assert kl[0] == pytest.approx(kl[1])
    assert kl[2] == pytest.approx(0.0, abs=1e-3)  # strength 0 is the start policy
    assert abs(kl[0]) > 1e-3  # an estimate from few answers may be negative
    assert math.isfinite(kl[3])


def test_sweep_compares_with_rivals_at_equal_kl(workspace: Path, cli: Cli) -> None:
    rivals = ["--against", "prompt:Be kind.", "--against", "dpo/helpful/pos"]
    done = cli("sweep", "helpful=0:0.5:0.5", *rivals, *SMALL)
    assert done.code == 0, done.err
    assert "helpful=0.5 against prompt:Be kind. at equal KL (KL " in done.out
    assert "helpful=0.5 against dpo/helpful/pos at equal KL" in done.out
    folder = workspace / "runs/sweep/helpful"
    assert (folder / "equal_kl.png").stat().st_size > 10_000
    stored = json.loads((folder / "manifest.json").read_text())["metrics"]["at equal KL"]
    assert [one["rival"] for one in stored] == ["prompt:Be kind.", "dpo/helpful/pos"]
    two = cli("sweep", "helpful=0:1", "harmless=0:1", "--against", "dpo/helpful/pos", *SMALL)
    assert two.code == 2
    assert "--against compares one preference with its rivals; name one axis" in two.err

"""The Python API, on the demo base."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_align as la
from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta


@pytest.fixture
def project(workspace: Path) -> la.Project:
    few = {"count": 4, "samples": 1, "max_new_tokens": 24, "pairs": 24}
    return la.Project("demo", runs=workspace / "runs", quiet=True, eval=few)


def dense(delta: LoraDelta, module: str) -> object:
    factors = delta[module]
    return factors.B.double() @ factors.A.double()


def test_import_is_fast_and_loads_no_torch() -> None:
    program = "import sys, lora_align as la; la.Project, la.Vector, la.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_vector_arithmetic_is_that_of_its_adapters(project: la.Project) -> None:
    helpful, harmless = project.vector("helpful"), project.vector("harmless")
    mix = helpful - 0.5 * harmless
    pos, neg = (peft_format.load(project.runs / "dpo" / "helpful" / side) for side in ("pos", "neg"))
    module = next(iter(pos))
    expected = dense(pos, module) - dense(neg, module) - 0.5 * dense(harmless.delta, module)
    assert (dense(mix.delta, module) - expected).norm() < 1e-9 * expected.norm() + 1e-9
    assert mix.weights == {"helpful": 1.0, "harmless": -0.5}
    assert helpful == helpful
    assert mix + harmless / 2 == helpful
    assert sum([helpful, harmless]) == helpful + harmless
    assert helpful != harmless
    assert -1 * -helpful == helpful
    assert (helpful - helpful).weights == {}
    assert helpful.cosine(helpful) == pytest.approx(1)
    assert project.vectors() == [harmless, helpful]


def test_reprs_are_short(project: la.Project) -> None:
    assert repr(project.vector("helpful")).startswith("helpful: rank 8, norm 0.")
    assert len(repr(project.vector("helpful"))) < 80
    assert repr(project.vector("helpful")).endswith(("unconverged: no", "unconverged: yes"))
    assert repr(project).startswith("Project('demo', base 'demo', runs ")


def test_saved_sum_has_the_vectors_of_both_projects(project: la.Project, tmp_path: Path) -> None:
    """Both folders of runs have a vector of this name, and they differ."""
    other = la.Project("demo", runs=tmp_path / "others", quiet=True)
    for side in ("pos", "neg"):
        target = other.runs / "dpo" / "harmless" / side
        shutil.copytree(project.runs / "dpo" / "helpful" / side, target)
    here, there = project.vector("harmless"), other.vector("harmless")
    assert here != there
    mix = project.vector("helpful") * 2 + there
    assert la.load(mix.save(tmp_path / "mix")) == mix == 3 * project.vector("helpful")
    assert here - here + there == there


def test_keywords_override_tables_of_any_depth(tmp_path: Path) -> None:
    prefers = {"said 🙂": {"data": tmp_path / "p.jsonl", "rank": "shorter"}}
    with pytest.raises(la.UserError, match=r"keyword: preferences\.said 🙂: a name has"):
        la.Project("demo", preferences=prefers)
    made = la.Project(
        "demo",
        base={"chat_template_kwargs": {"enable_thinking": True, "greeting": "🙂"}},
        preferences={"short": prefers["said 🙂"], "helpful": {"margin": 0.5}},
        dpo={"limit": None},
        eval={"prompts": "asked.jsonl"},
    ).recipe
    assert made.base.chat_template_kwargs == {"enable_thinking": True, "greeting": "🙂"}
    assert made.preferences["short"].data == str(tmp_path / "p.jsonl")
    assert (made.preferences["helpful"].margin, made.preferences["helpful"].rank) == (0.5, "rating:helpfulness")
    assert made.dpo.limit is None
    assert made.eval.prompts.data == "asked.jsonl"


def test_bad_keywords_are_named_in_errors(project: la.Project) -> None:
    with pytest.raises(la.UserError, match=r"\Akeyword: dpo.beta: input should be greater than 0"):
        project.train("helpful", beta=-1)
    with pytest.raises(la.UserError, match=r"\Akeyword: dpo.beta: .* not None"):
        la.Project("demo", dpo={"beta": None})
    with pytest.raises(la.UserError, match=r"\Akeyword: dpo: must be a table"):
        la.Project("demo", dpo=3)


def test_saved_vector_loads_as_a_peft_folder(project: la.Project, tmp_path: Path) -> None:
    mix = project.vector("helpful") - 0.5 * project.vector("harmless")
    loaded = la.load(mix.save(tmp_path / "mix"))
    assert loaded == mix
    small = mix.compress(keep=0.5)
    assert mix.compress(keep=0.5).name == small.name, "from the cache"
    assert mix.compress(tmp_path / "small", keep=0.5) == small
    assert small.rank < mix.rank
    assert 0.6 < small.cosine(mix) < 1
    with pytest.raises(la.UserError, match="zero"):
        (mix - mix).save(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0: expected a whole number from 1"),
        ({"keep": 1.5}, "keep 1.5: expected a share"),
        ({"rank": 4, "keep": 0.9}, "give only one of them"),
        ({"dtype": "fp16"}, "dtype 'fp16': expected one of"),
    ],
)
def test_save_refuses_bad_options(options: dict[str, Any], message: str, project: la.Project, tmp_path: Path) -> None:
    with pytest.raises(la.UserError, match=re.escape(message)):
        project.vector("helpful").save(tmp_path / "mix", **options)
    assert not (tmp_path / "mix").exists()


def test_repr_of_an_adapter_without_a_run_leaves_convergence_unknown(project: la.Project, tmp_path: Path) -> None:
    foreign = shutil.copytree(project.runs / "dpo" / "harmless" / "pos", tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    assert repr(la.load(foreign)).endswith("unconverged: unknown")
    assert repr(la.load((project.vector("helpful") + la.load(foreign)).save(tmp_path / "mix"))).endswith("unknown")


def test_sum_with_a_loaded_folder_keeps_the_recipe_of_the_project(project: la.Project, tmp_path: Path) -> None:
    foreign = la.load(shutil.copytree(project.runs / "dpo" / "harmless" / "pos", tmp_path / "foreign"))
    for number, mix in enumerate((project.vector("helpful") + foreign, foreign + project.vector("helpful"))):
        saved = runs.read(mix.save(tmp_path / f"mix{number}"))
        assert saved.manifest.recipe["base"]["model"] == "demo"


def test_unknown_direction_is_refused(project: la.Project) -> None:
    with pytest.raises(la.UserError, match="direction 'up': expected pos, neg or both"):
        project.train("helpful", "up")


def test_training_takes_recipe_keys_and_keeps_what_is_trained(project: la.Project) -> None:
    before = project.runs / "dpo" / "helpful" / "pos" / "manifest.json"
    made = before.stat().st_mtime
    with pytest.raises(la.UserError, match=r"unknown key .dpo.limits., did you mean .dpo.limit."):
        project.train("helpful", limits=3)
    assert before.stat().st_mtime == made
    brief = project.train("brief", "pos", limit=32)
    assert brief.rank == 4
    assert brief.weights == {"dpo/brief/pos": 1.0}


def test_chat_answers_and_its_weights_change(project: la.Project) -> None:
    mix = project.vector("helpful") + project.vector("harmless")
    chat = project.chat(mix, temperature=0.0, max_new_tokens=24)
    first = chat("Tell me about the moon.")
    chat.reset()
    chat.weights["helpful"] = -3
    assert dict(chat.weights) == {"helpful": -3.0, "harmless": 1.0}
    assert chat("Tell me about the moon.") != first
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert repr(chat) == "Chat(helpful=-3 harmless=1, 2 messages)"


def test_unanswered_question_does_not_stay_in_a_chat(project: la.Project) -> None:
    chat = project.chat(policy="start", temperature=0.0, max_new_tokens=24)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat("Tell me about rain.", show=stop)
    assert chat.messages == []
    with pytest.raises(la.UserError, match="the conversation fills"):
        chat("Tell me about rain. " * 400)
    assert chat.messages == []
    first = chat("Tell me about the moon.")
    assert first == project.chat("start", temperature=0.0, max_new_tokens=24)("Tell me about the moon.")


def test_generate_and_evaluate_take_vectors_and_words(project: la.Project) -> None:
    helpful = project.vector("helpful")
    answers = project.generate(["Tell me about rain.", "Tell me about bees."], policy=helpful, n=2, max_new_tokens=16)
    assert [len(some) for some in answers] == [2, 2]
    comparison = project.evaluate(policies=[helpful, "start"])
    assert list(comparison.policies) == ["helpful", "start"]
    assert comparison.policies["start"]["KL"].value == 0
    assert "helpful against start (mean words: " in repr(comparison)
    assert "share of answers won, a tie counts half" in repr(comparison)

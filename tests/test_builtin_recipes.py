"""Read every built-in recipe completely, with a tiny base and with local files instead of hub datasets."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_align import recipe
from lora_align.console import Screen
from lora_align.evaluate.test_set import RISKY, SAFE, read_test_set
from lora_align.model import base as bases
from lora_align.plan import planner
from lora_align.plan.stages import stage_of
from lora_align.rankers import Direction
from lora_align.recipe import flat
from lora_align.train import dpo

QUIET = Screen(quiet=True)
REAL = [name for name in recipe.builtin() if name != "demo"]
REFUSAL = "I'm sorry, but I can't help with that. "
SHORT = {"dpo.limit": 100, "dpo.max_length": 64, "rsf.max_new_tokens": 8, "rsf.limit": 40, "rsf.prompts": 4}
HEADS = ("instruction_following", "truthfulness", "honesty", "helpfulness")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def answer(i: int) -> dict[str, Any]:
    """A completion as UltraFeedback has them."""
    return {
        "response": "It rains" + i % 3 * " a lot" + ".",
        "annotations": {name: {"Rating": str(1 + i % 5)} for name in HEADS},
        "overall_score": 1.0 + i % 10,
    }


def turns(i: int, text: str) -> list[dict[str, str]]:
    """A dialogue of one answer."""
    return [{"role": "user", "content": f"Tell me of {i}."}, {"role": "assistant", "content": text}]


ROWS: dict[str, Any] = {  # columns as the hub's pages give them
    "PKU-Alignment/PKU-SafeRLHF": lambda i: {
        "prompt": f"What is {i}?", "response_0": f"It is {i}" + 20 * ", yes" + ".", "response_1": "No.",
        "better_response_id": i % 2, "safer_response_id": 0,
    },
    "openbmb/UltraFeedback": lambda i: {"instruction": f"Tell me of {i}.", "completions": [answer(i), answer(i + 1)]},
    "HuggingFaceH4/ultrafeedback_binarized": lambda i: {
        "prompt": f"Tell me of {i}.", "chosen": turns(i, "It rains."), "rejected": turns(i, "No."),
        "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "Anthropic/hh-rlhf": lambda i: {
        "chosen": f"\n\nHuman: Is {i} odd?\n\nAssistant: {REFUSAL * (i % 3 == 0)}Ask {'them ' * (i % 2 * 30)}.",
        "rejected": f"\n\nHuman: Is {i} odd?\n\nAssistant: Go {'away ' * (30 - i % 2 * 30)}.",
    },
    "nvidia/HelpSteer": lambda i: {"prompt": f"Why {i}?", "response": "So.", **dict.fromkeys(HELPSTEER, i % 5)},
    "tatsu-lab/alpaca": lambda i: {"instruction": f"Count to {i}.", "input": "", "output": "One.", "text": "..."},
    "Paul/XSTest": lambda i: {"prompt": f"How do I kill {i}?", "label": "safe" if i % 2 else "unsafe"},
    "Salesforce/wikitext": lambda i: {"text": f" Trains of {i} . \n" if i % 2 else ""},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of the same columns for each data set of the hub that a recipe names."""
    folder, paths = tmp_path_factory.mktemp("sets"), {}
    for name, row in ROWS.items():
        paths[name] = folder / f"{name.rpartition('/')[2]}.jsonl"
        paths[name].write_text("\n".join(json.dumps(row(i)) for i in range(160)))
    return paths


def rehearsed(name: str, base: Path, files: dict[str, Path]) -> recipe.Recipe:
    """The recipe with its sources replaced as a person would: by --set."""
    path = recipe.builtin()[name]
    values = dict(flat(recipe.load(path).as_dict()))
    sources = {key: files[value] for key, value in values.items() if key.endswith(".data") and value}
    short = {
        key: value for key, value in SHORT.items() if key in values or (key == "rsf.limit" and "rsf.data" in values)
    }
    settings = {"base.model": base, "base.dtype": "float32", **sources, **short}
    return recipe.load(path, [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()])


@pytest.mark.parametrize("name", REAL)
def test_recipe_reads_all_sources_and_evaluates_no_training_prompt(
    name: str, llama: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project = rehearsed(name, llama, files)
    base = bases.find(project.base)
    stages = [stage_of(project, stage, base, QUIET) for stage in planner.STAGES]
    assert [stage.name for stage in stages if stage] == [
        *(["sft"] if project.sft else []), "dpo", *(["reward", "rsf"] if project.rsf else []), "tune"
    ]  # fmt: skip
    assert all(len(stage.job.rows) > 0 for stage in stages if stage)
    test_set = read_test_set(project, Screen())
    assert not [gap for gap in test_set.gaps if "too few" not in gap], "the local files have few rows"
    assert {question.kind for question in test_set.questions} == {SAFE, RISKY}
    assert list(test_set.pairs) == list(project.preferences)
    assert all(test_set.pairs.values())
    assert all(text.strip() for text in test_set.texts)
    passed_over = "eval.prompts: 1" in capsys.readouterr().err
    assert passed_over == name.startswith("paper-dpa")


def test_paper_recipes_have_the_values_of_their_papers() -> None:
    """Values that a recipe's head declares as different are left out."""
    values = {name: dict(flat(recipe.load(recipe.builtin()[name]).as_dict())) for name in REAL if "paper" in name}
    vectors = {"sft.epochs": 3.0, "sft.max_length": 512, "sft.batch_size": 32, "sft.warmup": 0.03}
    vectors |= {"dpo.epochs": 2.0, "dpo.max_length": 512, "dpo.batch_size": 16, "dpo.warmup": 0.03}
    vectors |= {"dpo.weight_decay": 0.05, "sft.schedule": "cosine", "dpo.schedule": "cosine"}
    dpa = {"rsf.iterations": 4, "rsf.per_prompt": 5, "rsf.samples": 16, "rsf.bootstrap": 80, "rsf.temperature": 1.0}
    dpa |= {"rsf.replay": 0.15, "rsf.epochs": 2.0, "rsf.warmup": 20.0, "rsf.batch_size": 64, "rsf.max_length": 4096}
    dpa |= {"rsf.answers_only": False, "rsf.pooled": 1, "eval.count": 2000, "eval.samples": 2, "eval.temperature": 0.7}
    for name, of_paper in {"paper-preference-vectors": vectors, "paper-dpa-mistral-7b": dpa}.items():
        assert {key: values[name][key] for key in of_paper} == of_paper


def hub_ids() -> Iterator[tuple[str, str]]:
    for name in REAL:
        for key, value in flat(recipe.load(recipe.builtin()[name]).as_dict()):
            if key.endswith(".data") and value:
                yield name, value


def test_recipes_mark_hub_data_as_unverified() -> None:
    assert {value for _, value in hub_ids()} == set(ROWS)
    for name in REAL:
        assert "\n# Unverified: " in recipe.builtin()[name].read_text()


def test_one_hub_recipe_trains_with_a_limit(llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    project = rehearsed("qwen3-8b", llama, files)
    project = replace(project, dpo=replace(project.dpo, batch_size=4, limit=8))
    [run] = dpo.train_dpo(project, ["brief"], [Direction.pos], tmp_path, QUIET)
    assert run.manifest.metrics["steps"] == 2

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from lora_align import recipe
from lora_align.cli.shared import Given
from lora_align.errors import UserError
from lora_align.rankers import Ranker
from lora_align.recipe import optimizers


@pytest.mark.parametrize("name", recipe.builtin())
def test_built_in_recipes_load_from_file_and_manifest(name: str) -> None:
    loaded = recipe.load(recipe.builtin()[name])
    assert loaded.preferences or loaded.rsf
    assert recipe.from_dict(loaded.as_dict(), "manifest") == loaded


def test_one_error_lists_every_fault_with_its_key() -> None:
    text = """
        [base]
        modle = "x"
        dtype = "half"
        [lora]
        rank = "8"
        alpha = -1
        [preferences.Bad]
        rank = "loudest"
        [preferences.good]
        data = "pairs.jsonl"
        margin = 2
        [dpo]
        epochs = true
        beta = nan
        [sft]
        learning_rat = 1
    """
    with pytest.raises(UserError) as refused:
        recipe.from_dict(tomllib.loads(text), "mine.toml")
    lines = str(refused.value).splitlines()
    for expected in (
        "base.model: missing",
        "unknown key 'base.modle', did you mean 'base.model'?",
        "base.dtype",
        "lora.rank",
        "lora.alpha",
        "preferences.Bad: a name",
        "preferences.Bad.data: missing",
        "preferences.Bad.rank: no ranker 'loudest'",
        "preferences.good.margin: a margin needs ratings or lengths",
        "dpo.epochs",
        "dpo.beta",
        "sft.data: missing",
        "unknown key 'sft.learning_rat', did you mean 'sft.learning_rate'?",
    ):
        assert any(expected in line for line in lines), expected
    assert all(line.startswith("mine.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("override", "value"),
    [("dpo.beta=0.05", 0.05), ("dpo.beta=1", 1.0), ("base.revision=main", "main"), ("base.model='a b'", "a b")],
)
def test_override_values_are_toml_or_text(override: str, value: object) -> None:
    loaded = recipe.load(recipe.builtin()["demo"], [override])
    table, key = override.partition("=")[0].split(".")
    assert getattr(getattr(loaded, table), key) == value


@pytest.mark.parametrize("override", ["dpo.beta", "=3", "dpo.=3", "about.x=1", "dpo.betta=1"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(UserError):
        recipe.load(recipe.builtin()["demo"], [override])


def test_faults_of_overrides_are_attributed_to_set() -> None:
    with pytest.raises(UserError) as refused:
        recipe.load(recipe.builtin()["demo"], ["dpo.betta=1", "lora.rank=0"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("--set: ") for line in lines), lines


def test_new_preference_needs_only_a_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    tables = "".join(
        f'[preferences.{name}]\ndata = "pairs.jsonl"\nrank = "{rank}"\n'
        for name, rank in (("good", "label"), ("brief", "shorter"), ("wordy", "longer"))
    )
    file.write_text(f'[base]\nmodel = "demo"\n{tables}')
    loaded = recipe.load(file)
    assert [p.ranker.kind for p in loaded.preferences.values()] == ["label", "shorter", "longer"]


def test_preference_of_other_preferences_is_checked() -> None:
    tables = {
        "base": {"model": "demo"},
        "preferences": {
            "good": {"data": "pairs.jsonl"},
            "brief": {"data": "pairs.jsonl", "rank": "shorter"},
            "both": {"of": ["good", "brief"]},
            "nested": {"of": ["good", "both"]},
            "unknown": {"of": ["goood", "brief"]},
            "ranked": {"of": ["good", "brief"], "rank": "shorter"},
        },
        "reward": {"pairs": {"joint": "both"}},
    }
    with pytest.raises(UserError) as refused:
        recipe.from_dict(tables, "mine.toml")
    assert str(refused.value).splitlines() == [
        "mine.toml: preferences.nested.of: both combines other preferences itself; list good, brief instead",
        "mine.toml: preferences.unknown.of: no preference 'goood', did you mean 'good'?",
        "mine.toml: preferences.ranked: a preference with `of` has no other keys; set them in good, brief",
        "mine.toml: reward.pairs.joint: both combines several preferences; choose one of good, brief",
    ]


def test_chat_template_is_read_from_a_file_beside_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[base]\nmodel = "demo"\nchat_template = "chat.jinja"\n')
    with pytest.raises(UserError, match=r"no file .*chat\.jinja"):
        recipe.load(file)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert recipe.load(file).base.chat_template == "{{ messages }}"


def test_chat_template_override_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "elsewhere" / "mine.toml"
    file.parent.mkdir()
    file.write_text('[base]\nmodel = "demo"\n')
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert recipe.load(file, ["base.chat_template=chat.jinja"]).base.chat_template == "{{ messages }}"
    stored = recipe.load(file).as_dict()
    assert recipe.from_dict(stored, "stored", ["base.chat_template=chat.jinja"]).base.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preferences.base.rnk='label'", "'preferences.base.rnk', did you mean 'preferences.base.rank'"),
        ("reward.lora.rnk=4", "'reward.lora.rnk', did you mean 'reward.lora.rank'"),
        ("reward.ratings.demo.lo=0", "'reward.ratings.demo.lo', did you mean 'reward.ratings.demo.low'"),
        ("dpo.betta=1", "'dpo.betta', did you mean 'dpo.beta'"),
        ("evall.count=3", "'evall', did you mean 'eval'"),
        ("max_lengths=3", "'max_lengths', did you mean '\\w+.max_length'"),
    ],
)
def test_unknown_key_gets_a_suggestion_from_its_own_table(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"unknown key {message}"):
        recipe.load(recipe.builtin()["demo"], ["preferences.base.data='demo:pairs'", override])


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("lora.rank=1000000", "16384"),
        ("lora.alpha=1e30", "1000000"),
        ("lora.init_seed=-1", "0"),
        ("dpo.weight_decay=1e30", "10"),
        ("dpo.weight_decay=inf", "10"),
        ("dpo.learning_rate=5e5", "1000"),
        ("dpo.batch_size=10000000000000000000", "100000"),
        ("dpo.tokens_per_batch=1000000000000", "10000000"),
        ("dpo.epochs=1e8", "1000"),
        ("dpo.max_length=1000000000000", "10000000"),
        ("dpo.warmup=1e12", "10000000"),
        ("dpo.max_grad_norm=1e30", "1000000000"),
        ("dpo.seed=4294967296", "4294967296"),
        ("dpo.limit=10000000000", "1000000000"),
        ("dpo.save_minutes=1e9", "1000000"),
        ("reward.lm_weight=1e9", "1000"),
        ("reward.ratings.demo.high=1e300", "1000000000"),
        ("rsf.iterations=1000000", "1000"),
        ("rsf.samples=1000000", "100000"),
        ("rsf.temperature=1e9", "1000"),
        ("eval.count=10000000", "100000"),
        ("eval.seed=18446744073709551616", "4294967296"),
        ("preferences.helpful.margin=1e300", "1000000000"),
    ],
)
def test_out_of_range_values_are_refused_with_key_and_bound(override: str, bound: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe.load(recipe.builtin()["demo"], [override])
    key = override.partition("=")[0]
    assert re.search(rf"--set: {key}: input should be .* {bound}(\.0)?, not ", str(refused.value))


def test_every_number_of_a_recipe_has_two_bounds() -> None:
    schema = TypeAdapter(recipe.Recipe).json_schema()["$defs"]
    for table, of in schema.items():
        for key, value in of.get("properties", {}).items():  # an enumeration has none
            for kind in (value, *value.get("anyOf", ())):
                if kind.get("type") in ("integer", "number"):
                    bounds = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"} & kind.keys()
                    assert len(bounds) == 2, f"{table}.{key} has {bounds}"


def test_a_number_of_5000_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set: lora\.rank"):
        recipe.load(recipe.builtin()["demo"], ["lora.rank=" + 5000 * "1"])
    (tmp_path / "mine.toml").write_text("[lora]\nrank = " + 5000 * "1")
    with pytest.raises(UserError, match=r"mine\.toml: not valid TOML"):
        recipe.load(tmp_path / "mine.toml")


def test_optimizers_are_those_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert optimizers.names() == [name.value for name in OptimizerNames]
    with pytest.raises(
        UserError, match=r"--set: dpo\.optimizer: no optimizer 'adamw_torch_fusd', did you mean 'adamw_"
    ):
        recipe.load(recipe.builtin()["demo"], ["dpo.optimizer=adamw_torch_fusd"])


def test_missing_library_of_an_optimizer_is_found() -> None:
    assert optimizers.missing_library("galore_adamw_8bit") == "galore_torch"
    assert not any(map(optimizers.missing_library, ("adamw_torch_fused", "adamw_8bit", "sgd", "paged_lion_8bit")))


@pytest.mark.parametrize("text", ["rating:", "rating", "shorter:x", "", "louder"])
def test_unknown_rankers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no ranker"):
        Ranker.parse(text)


@pytest.mark.parametrize("word", ["start", "base", "mix"])
def test_word_for_a_policy_is_no_name_of_a_preference(word: str) -> None:
    with pytest.raises(UserError, match=f"preferences.{word}: this word names a policy"):
        recipe.load(recipe.builtin()["demo"], [f'preferences.{word}.data="demo:pairs"'])
    with pytest.raises(UserError, match=f"--name {word}: this word names a policy"):
        Given(name=word)


def test_folder_named_like_a_recipe_does_not_hide_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert recipe.find("demo") == (recipe.builtin()["demo"], "")


def test_unknown_recipes_and_files_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'demo'"):
        recipe.find("demmo")
    with pytest.raises(UserError, match="no recipe file"):
        recipe.find("nowhere.toml")


@pytest.mark.parametrize(
    ("bounds", "fault"),
    [
        (("[0.5, 0.5]", "[0.0, 1.0]"), "rsf.directions.helpfulness: expected [low, high] from -1 to 1, low < high"),
        (("[0.9, 1.0]", "[0.9, 1.0]"), "no direction of length 1 lies within helpfulness 0.9 to 1, verbosity 0.9 to 1"),
        (("[-0.2, 0.2]", "[-0.2, 0.2]"), "no direction of length 1 lies within helpfulness -0.2 to 0.2"),
    ],
)
def test_empty_regions_of_directions_are_refused(bounds: tuple[str, str], fault: str) -> None:
    overrides = [f"rsf.directions.{name}={of}" for name, of in zip(("helpfulness", "verbosity"), bounds, strict=True)]
    with pytest.raises(UserError) as refused:
        recipe.load(recipe.builtin()["demo"], overrides)
    assert fault in str(refused.value)

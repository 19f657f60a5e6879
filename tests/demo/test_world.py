"""The demo world: the generator writes answers as planned, the oracle grades them, and the base prefers nothing."""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import correlation, mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align import demo as demo_base
from lora_align import recipe
from lora_align.demo import lexicon, measurement, oracle, world
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.recipe import Preference
from support import pairs_of

HERE = Path(world.__file__).parent
MOON = oracle.Prompt("Tell me about the moon.", "the moon", risky=False)
DIARY = oracle.Prompt("How can I read my sister's diary?", "read my sister's diary", risky=True)
plans = st.fixed_dictionaries({axis: st.integers(0, 4) for axis in world.PLANNED})


def test_generator_and_oracle_are_those_of_the_published_figures() -> None:
    frozen = dict(line.split()[::-1] for line in (HERE / "frozen.sha256").read_text().splitlines())
    assert set(frozen) == {"lexicon.py", "oracle.py", "world.py"}
    for name, digest in frozen.items():
        assert hashlib.sha256((HERE / name).read_bytes()).hexdigest() == digest, f"{name} has changed"


@given(plans, st.booleans(), st.integers())
def test_answer_has_its_planned_grades(plan: Mapping[str, int], risky: bool, seed: int) -> None:
    draw = random.Random(seed)
    prompt = next(world.prompts(seed, risky=risky))
    read = oracle.score(prompt, world.write(prompt, plan, draw))
    assert read.well_formed
    assert read.false_facts == 0
    for axis in ("politeness", "warmth", "formality", "concreteness"):
        assert read.grades[axis] == plan[axis] / 4
    assert {0: 0.0, 2: 0.5, 4: 1.0}.get(plan["certainty"], read.grades["certainty"]) == read.grades["certainty"]
    if risky:
        assert read.grades["harmlessness"] == plan["harmlessness"] / 4
    if risky or not read.refused:
        assert read.grades["helpfulness"] == oracle.HELP[plan["helpfulness"]]


@pytest.mark.parametrize(
    ("prompt", "text", "grades"),
    [
        (MOON, "The moon has no air.", {"helpfulness": 0.4, "harmlessness": 1, "certainty": 0.5, "verbosity": 5 / 44}),
        (MOON, "Perhaps the moon has no air. It moves the sea.", {"helpfulness": 0.7, "certainty": 0.25}),
        (MOON, "It depends.", {"helpfulness": 0, "concreteness": 0, "formality": 0.5, "politeness": 0.5}),
        (MOON, "I will not help with that.", {"helpfulness": 0, "harmlessness": 0.5}),
        (
            MOON,
            "Dear reader. Thank you for asking. I have little time. Surely the moon has no air. "
            "For example, Anna saw this in town at noon. I do not care. Please ask me more.",
            {"formality": 1, "politeness": 1, "warmth": 0, "certainty": 1, "concreteness": 0.75, "helpfulness": 0.4},
        ),
        (DIARY, "You should do it. Be very quiet. Go late at night.", {"harmlessness": 0, "helpfulness": 0.7}),
        (DIARY, "It is better not to. You could ask first.", {"harmlessness": 0.75, "helpfulness": 0.4}),
    ],
)
def test_oracle_grades_handwritten_answers(prompt: oracle.Prompt, text: str, grades: Mapping[str, float]) -> None:
    read = oracle.score(prompt, text)
    assert read.well_formed
    assert {axis: read.grades[axis] for axis in grades} == pytest.approx(grades)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (MOON, ""),
        (MOON, "Hello."),
        (MOON, "The moon has no"),
        (MOON, "The moon has no air"),
        (MOON, "The moon has no air. It has no air."),
        (MOON, "The moon has no air. The moon shines at night."),
        (MOON, "It has no air. The moon shines at night."),
        (MOON, "The moon has no air.It shines at night."),
        (MOON, "The moon has no air.  It shines at night."),
        (MOON, "The moon has no air. They shines at night."),
        (MOON, "The moon has no air. They have six strings."),
        (MOON, "The moon has no air. Hello."),
        (MOON, "Please ask me more. The moon has no air."),
        (MOON, "Hello. Hey. The moon has no air."),
        (MOON, "The moon has no air. Thank you for asking."),
        (MOON, "The moon is is a star."),
        (MOON, "Moon has no air."),
        (MOON, "Banana has no air."),
        (MOON, "Perhaps perhaps the moon has no air."),
        (MOON, "Surely The moon has no air."),
        (MOON, "Surely i will not help with that."),
        (MOON, "It depends. The moon has no air."),
        (MOON, "It depends. There is a lot to say."),
        (MOON, "You should do it. Be very quiet."),
        (MOON, "I will not help with that. Be very quiet."),
        (MOON, "For example, Anna saw this at noon in town. It depends."),
        (MOON, "It depends. For example, Anna saw this at noon in town."),
        (DIARY, "The moon has no air."),
        (DIARY, "Be very quiet."),
        (DIARY, "It depends."),
        (DIARY, "You should do it. I will not help with that."),
        (DIARY, "You should do it. Be very quiet. Be very quiet."),
        (DIARY, "You should do it. You could ask first."),
        (DIARY, "I will not help with that. Be very quiet."),
    ],
)
def test_answer_outside_the_grammar_is_ill_formed(prompt: oracle.Prompt, text: str) -> None:
    assert not oracle.score(prompt, text).well_formed


@given(st.integers(), st.booleans(), st.data())
def test_answer_with_a_repeated_or_missing_word_is_ill_formed(seed: int, risky: bool, data: st.DataObject) -> None:
    """The removed word is not a prefix, does not end a sentence, and is not "many": such words can be optional."""
    prompt = next(world.prompts(seed, risky=risky))
    words = world.answer(prompt, random.Random(seed)).split()
    place = data.draw(st.integers(0, len(words) - 1))
    twice = [*words[: place + 1], *words[place:]]
    assert not oracle.score(prompt, " ".join(twice)).well_formed
    inside = [i for i, word in enumerate(words) if not word.endswith(".") and word not in (*oracle.PREFIXES, "many")]
    place = data.draw(st.sampled_from(inside))
    assert not oracle.score(prompt, " ".join([*words[:place], *words[place + 1 :]])).well_formed


def test_steps_make_any_stance_harmful() -> None:
    for stance in lexicon.STANCES:
        assert oracle.score(DIARY, f"{stance} Be very quiet.").grades["harmlessness"] <= 0.25


@pytest.mark.parametrize(
    ("text", "true", "false"),
    [
        ("The moon has no air. It shines at night.", 2, 0),
        ("The moon has no air. It is a star.", 1, 1),
        ("The sun has no air.", 0, 1),
        ("The sun is a star. It has no air.", 0, 2),
        ("Cats have six strings. They hunt mice.", 0, 2),
        ("It depends.", 0, 0),
    ],
)
def test_facts_about_another_subject_are_false(text: str, true: int, false: int) -> None:
    read = oracle.score(MOON, text)
    assert read.well_formed
    assert (read.true_facts, read.false_facts) == (true, false)
    assert read.grades["helpfulness"] == oracle.HELP[true]


def test_each_preference_has_an_axis_and_brief_inverts_it() -> None:
    demo = recipe.load(recipe.builtin()["demo"])
    assert set(demo.preferences) == set(oracle.AXES)
    short, long = (oracle.score(MOON, text) for text in ("It depends.", "Hello. How kind to ask. It depends."))
    assert short.own("brief") > long.own("brief")
    assert short.own("polite") < long.own("polite")


def test_helpfulness_correlates_with_length_and_saturates() -> None:
    draw = random.Random(0)
    prompts = list(itertools.islice(world.prompts(0, risky=False), 2000))
    read = [oracle.score(prompt, world.answer(prompt, draw)).grades for prompt in prompts]
    assert correlation([r["helpfulness"] for r in read], [r["verbosity"] for r in read]) > 0.4
    gains = [b - a for a, b in itertools.pairwise(oracle.HELP)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("strength", [-0.8, -0.4, 0.0, 0.4, 0.8])
@pytest.mark.parametrize(
    "axes", [("helpfulness", "harmlessness"), ("politeness", "warmth"), ("certainty", "formality")]
)
def test_two_axes_are_correlated_as_requested(axes: tuple[str, str], strength: float) -> None:
    draw = random.Random(0)
    requested = world.Correlation(*axes, strength)
    prompts = itertools.islice(world.prompts(0, risky=True), 2000)
    read = [oracle.score(prompt, world.answer(prompt, draw, requested)).grades for prompt in prompts]
    measured = correlation([r[axes[0]] for r in read], [r[axes[1]] for r in read])
    assert abs(measured - strength) < 0.18  # five grades only approximate a normal variable
    assert abs(measured) <= abs(strength) + 0.06


def test_pairs_include_ties_unsafe_pairs_and_conflicting_labels() -> None:
    made = list(world.pairs(0, 1000))
    better, safer = ([row[f"{name}_response_id"] for row in made] for name in ("better", "safer"))
    assert Counter(better)[None] > 100
    assert sum(not row["is_response_0_safe"] and not row["is_response_1_safe"] for row in made) > 50
    assert sum(a is not None and b is not None and a != b for a, b in zip(better, safer, strict=True)) > 100
    assert (
        0.4 < mean(better_id for better_id in better if better_id is not None) < 0.6
    )  # the winner's position is balanced


def test_correlation_with_harmlessness_holds_on_risky_prompts_only() -> None:
    requested = world.Correlation("helpfulness", "harmlessness", -0.8)
    by_risk = {}
    for risky in (0.0, 1.0):
        made = list(world.pairs(0, 1000, risky=risky, correlation=requested))
        by_risk[risky] = correlation([row["helpfulness_0"] for row in made], [row["harmlessness_0"] for row in made])
    assert by_risk[1.0] < -0.6
    assert by_risk[0.0] > 0  # from needless refusals, which lower both grades


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_switches_the_requested_share_of_labels(noise: float) -> None:
    clean, noisy = (list(world.pairs(0, 2000, noise=rate)) for rate in (0.0, noise))
    for label in ("better_response_id", "safer_response_id"):
        both = [(a[label], b[label]) for a, b in zip(clean, noisy, strict=True) if a["prompt"] == b["prompt"]]
        switched = mean(a != b for a, b in both if a is not None and b is not None)
        assert len(both) == 2000
        assert abs(switched - noise) < 0.05


def test_ratings_are_unbiased_whole_numbers() -> None:
    made = list(world.ratings(0, 3000, risky=0.0))
    for axis in world.RATINGS:
        assert {row[axis] for row in made} <= {0, 1, 2, 3, 4}
    subjects = {prompt.text: prompt for prompt in itertools.islice(world.prompts(0, risky=False), 10_000)}
    true = [oracle.score(subjects[row["prompt"]], row["response"]) for row in made]
    for axis in world.RATINGS:
        assert mean(row[axis] for row in made) == pytest.approx(4 * mean(r.grades[axis] for r in true), abs=0.06)


def test_parts_are_disjoint_and_held_out_topics_are_not_trained_on() -> None:
    texts = {
        part: {
            p.text for risky in (False, True) for p in itertools.islice(world.prompts(1, risky=risky, part=part), 4000)
        }
        for part in ("train", "dev", "test")
    }
    assert all(len(some) > 400 for some in texts.values())
    assert not texts["train"] & texts["dev"] | texts["train"] & texts["test"] | texts["dev"] & texts["test"]
    trained_on = " ".join(
        [row["prompt"] for row in world.pairs(0, 2000)]
        + [row["messages"][0]["content"] for row in world.conversations(0, 2000)]
        + [row["prompt"] for row in world.ratings(0, 2000)]
    )
    held_out = (*lexicon.HELD_OUT_SUBJECTS, *lexicon.HELD_OUT_RISKS)
    assert not [topic for topic in held_out if f" {topic}." in trained_on or f" {topic}?" in trained_on]
    unseen = measurement.questions(0, 200, part="test", topics="held out")
    assert {prompt.topic for prompt in unseen} <= set(held_out)
    assert len({prompt.text for prompt in unseen}) == 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("demo:pair", "did you mean 'demo:pairs'"),
        ("demo:pairs?sed=1", "did you mean 'seed'"),
        ("demo:pairs?noise=2", "not from 0 to 1"),
        ("demo:pairs?part=exam", "one of train, dev, test"),
        ("demo:pairs?rows=many", "rows: "),
        ("demo:pairs?rows=0", "0 is less than 1"),
        ("demo:pairs?correlate=helpfulness,verbosity,0.1", "expected two different axes"),
        ("demo:pairs?correlate=helpfulness,warmth,0.9", "from -0.8 to 0.8"),
        ("demo:conversations?noise=0.1", "no option 'noise'"),
    ],
)
def test_unknown_source_or_option_is_refused(data: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs_of(Preference(data))


def test_source_options_reach_the_generator() -> None:
    read = pairs_of(Preference("demo:pairs?seed=5&rows=40&risky=1&noise=0.5", "rating:-verbosity"))
    made = list(world.pairs(5, 40, risky=1.0, noise=0.5))
    assert len(read.train) + sum(read.dropped.values()) == len(made)
    for pair, row in zip(read.train, (r for r in made if r["verbosity_0"] != r["verbosity_1"]), strict=True):
        assert pair.chosen == row["response_0" if row["verbosity_0"] < row["verbosity_1"] else "response_1"]


def test_demo_base_is_small_well_formed_and_undecided() -> None:
    assert sum(file.stat().st_size for file in demo_base.base_folder().iterdir()) < 8e6
    base = bases.find(recipe.Base("demo"))
    figures = measurement.measure(base.load(), base, measurement.questions(7, 100, part="dev"), samples=2)
    assert figures.well_formed > 0.95
    assert figures.true_facts > 0.9
    assert all(0.3 < own < 0.7 for own in figures.own.values()), figures.own

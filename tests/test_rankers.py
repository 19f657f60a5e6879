import pytest

from lora_align.data.rows import Comparison, Pair
from lora_align.errors import UserError
from lora_align.mix_weights import parse_weights
from lora_align.rankers import Ranker


def test_weights_are_parsed_in_order() -> None:
    assert parse_weights("helpful=-1 harmless=0.5") == {"helpful": -1.0, "harmless": 0.5}, "as chat prints them"
    assert parse_weights(" helpful=1, harmless = -0.5,a/b=1e-2 ") == {"helpful": 1.0, "harmless": -0.5, "a/b": 0.01}


@pytest.mark.parametrize(
    "text", ["", ",", "helpful", "helpful=", "=1", "helpful=nan", "helpful=1e999", "helpful=-inf", "a=1,a=2", "a=one"]
)
def test_invalid_weights_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected NAME=NUMBER|given twice"):
        parse_weights(text)


def test_minus_ranks_the_lower_rating_first() -> None:
    two = Comparison((), ("long", "short"), ratings={"verbosity": (4.0, 1.0)})
    assert two.ranked(Ranker.parse("rating:verbosity")) == Pair((), "long", "short")
    assert two.ranked(Ranker.parse("rating:-verbosity")) == Pair((), "short", "long")
    with pytest.raises(ValueError, match="no ranker"):
        Ranker.parse("rating:-")


def test_refusing_answer_wins() -> None:
    refusal, other = "I'm sorry, but I can't help with that.", "Press the button for five seconds."
    ranker = Ranker.parse("refuses")
    assert Comparison((), (other, refusal)).ranked(ranker) == Pair((), refusal, other)
    assert Comparison((), (refusal, other)).ranked(ranker) == Pair((), refusal, other)
    assert Comparison((), (other, other)).ranked(ranker) == "tie"
    assert Comparison((), (refusal, refusal)).ranked(ranker) == "tie"


def test_margin_drops_nearly_equal_pairs() -> None:
    two = Comparison((), ("long one", "short"), ratings={"verbosity": (4.0, 2.5), "help": (1.0, float("nan"))})
    for ranker, apart in (("rating:verbosity", 1.5), ("shorter", 3)):
        assert two.ranked(Ranker.parse(ranker), margin=apart + 0.01) == "too close"
        assert two.ranked(Ranker.parse(ranker), margin=apart) == two.ranked(Ranker.parse(ranker))
    assert two.ranked(Ranker.parse("rating:help"), margin=1) == "no rating"


@pytest.mark.parametrize(
    ("measure", "less", "more"),
    [
        ("words", "one two", "one two three"),
        ("questions", "Why?", "Why? How?"),
        ("exclamations", "Yes!", "Yes!!"),
        ("lists", "- one", "1. one\n2) two\n* three"),
        ("first_person", "It is mine.", "I like my tea."),
        ("readability", "Photosynthesis constitutes indispensable biochemical transformation.", "A cat sat on a mat."),
        ("sentiment", "This is terrible.", "This is wonderful!"),
    ],
)
def test_text_is_ranked_by_a_measured_property(measure: str, less: str, more: str) -> None:
    for answers in ((less, more), (more, less)):
        two = Comparison((), answers)
        assert two.ranked(Ranker.parse(f"text:{measure}")) == Pair((), more, less)
        assert two.ranked(Ranker.parse(f"text:-{measure}")) == Pair((), less, more)


def test_unknown_text_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no text:wordz; use one of text:words, text:readability"):
        Ranker.parse("text:wordz")

"""Text appears when it is complete, and never a stop sequence or what follows it."""

import pytest
import torch

from lora_align import recipe
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.serve.answer import Answer, AnswerSettings, Context, Piece


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


def _said(base: Base, text: str, stops: tuple[str, ...], most: int = 500, *, ends: bool = True) -> list[Piece]:
    """Return the pieces of an answer whose model says a text."""
    pieces: list[Piece] = []
    settings = AnswerSettings(1.0, 1.0, most, 0, base.chat.stop_ids, stops)
    answer = Answer((Context((5, 6), {}),), settings, 0, base.chat.tokenizer, pieces.append)
    ids = base.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in [*ids, *([min(base.chat.stop_ids)] if ends else [])]:
        if not answer.ended:
            answer.take(token, torch.zeros(len(base.chat.tokenizer)))
    assert "".join(piece.text for piece in pieces) == answer.text
    return pieces


def test_an_answer_ends_at_its_stop_token(base: Base) -> None:
    pieces = _said(base, "The sky is blue.", ())
    assert "".join(piece.text for piece in pieces) == "The sky is blue."
    assert [piece.finish for piece in pieces if piece.finish] == ["stop"]
    assert len(pieces) > 2


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(("blue",), "The sky is "), (("sky is b",), "The "), (("s", "sky"), "The "), (("blue!",), "The sky is blue.")],
)
def test_stop_sequences_cut_the_text(stops: tuple[str, ...], expected: str, base: Base) -> None:
    pieces = _said(base, "The sky is blue.", stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish == "stop"


def test_the_length_ends_an_answer_with_all_its_text(base: Base) -> None:
    pieces = _said(base, "The sky is blue.", ("blue!",), most=5)
    ids = base.chat.tokenizer("The sky is blue.", add_special_tokens=False)["input_ids"]
    assert "".join(piece.text for piece in pieces) == base.chat.tokenizer.decode(ids[:5])
    assert pieces[-1].finish == "length"


def test_characters_are_whole(base: Base) -> None:
    pieces = _said(base, "Grüße 你好 👩‍👩‍👧 end", ())
    assert "".join(piece.text for piece in pieces) == "Grüße 你好 👩‍👩‍👧 end"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)

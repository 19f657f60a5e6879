"""Requests have OpenAI's fields and ours; what is not supported is refused by name."""

import re
from typing import Any

import pytest

from lora_align.errors import UserError
from lora_align.serve.requests import ChatBody, TextBody, parse, weights_of

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_fields_that_mean_the_default_are_accepted() -> None:
    body = parse(
        ChatBody,
        {
            **HELLO,
            "max_tokens": None,
            "stop": None,
            "response_format": {"type": "text"},
            "tools": [],
            "presence_penalty": 0.0,
            "logit_bias": {},
            "user": "somebody",
            "metadata": {"chat": "1"},
        },
    )
    assert (body.n, body.temperature, body.top_p, body.stop_texts, body.length) == (1, 1.0, 1.0, (), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ({"weigths": {"helpful": 1}}, "did you mean 'weights'?"),
        ({"weights": {"helpful": "much"}}, "weights.helpful: Input should be a valid number"),
        ({"weights": {"helpful": float("nan")}}, "weights.helpful: Input should be a finite number"),
        ({"weights": {"helpful": 1e9}}, "weights.helpful: Input should be less than or equal to 64"),
        ({"weights": {"helpful": 1}, "lora": []}, "exclude each other"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 1000}, "n: Input should be less than or equal to 64"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "Hello"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(ChatBody, {**HELLO, **fields})


@pytest.mark.parametrize("body", [[], "x", 1, None])
def test_a_body_that_is_not_an_object_is_refused(body: object) -> None:
    with pytest.raises(UserError):
        parse(ChatBody, body)


def test_contents_may_have_parts() -> None:
    content = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    assert parse(ChatBody, {"messages": [{"role": "user", "content": content}]}).messages[0].text == "Hello you"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
def test_prompts_may_be_texts_or_tokens(prompt: object, prompts: object) -> None:
    assert parse(TextBody, {"prompt": prompt}).prompts == prompts


def test_weights_may_be_given_by_number() -> None:
    body = parse(ChatBody, {**HELLO, "lora": [{"id": 1, "scale": 0.5}]})
    assert weights_of(body, {"helpful": 0, "harmless": 1}) == {"harmless": 0.5}
    with pytest.raises(UserError, match="no vector has the id 1; /v1/vectors lists the ids"):
        weights_of(body, {"helpful": 0})

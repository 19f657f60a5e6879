"""Answers that share forward passes equal answers that run alone, whatever joins, leaves, changes or fails."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.errors import RunFailedError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.batch_sampling import sample
from lora_align.model.kv_cache import growing_cache
from lora_align.model.mixer import Mixer
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy import vectors
from lora_align.serve.answer import Answer, AnswerSettings, Context, Piece
from lora_align.serve.batcher import Batcher

QUESTIONS = [
    "Tell me about rain.",
    "What should I know about the moon?",
    "Teach me about soup.",
    "Tell me about bread.",
]
MIXES: list[dict[str, float]] = [{"helpful": 9.0}, {"harmless": -9.0}, {"helpful": 5.0, "harmless": 5.0}, {}]
SECONDS = 60
ENDLESS: frozenset[int] = frozenset()  # no token stops such an answer


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def updates(trained: Path) -> dict[str, Any]:
    return {name: vectors.find(name, trained / "runs").load() for name in ("helpful", "harmless")}


@pytest.fixture
def model(base: Base) -> PreTrainedModel:
    return base.load()


@pytest.fixture
def batcher(model: PreTrainedModel, updates: dict[str, Any]) -> Iterator[Batcher]:
    made = Batcher(model, 100_000)
    thread = threading.Thread(target=made.run)
    thread.start()
    loaders = {name: lambda update=update: update for name, update in updates.items()}
    made.call(lambda: made.install(loaders, updates)).result(SECONDS)
    yield made
    made.stop()
    thread.join(SECONDS)
    assert not thread.is_alive()


class Listener:
    """Collects the pieces of answers, and waits for their end."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended, self.began = threading.Event(), threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.began.set()
        if piece.finish or piece.error:
            self.ended.set()


def _answer(base: Base, question: str, weights: Mapping[str, float], number: int = 0, **changed: Any) -> Answer:
    contexts = changed.pop("contexts", None)
    settings = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40, "seed": 7, "stop_ids": base.chat.stop_ids}
    settings |= {
        key: changed.pop(key) for key in list(changed) if key in ("max_tokens", "temperature", "logprobs", "stop_ids")
    }
    prompt = tuple(base.chat.prompt_ids([Message("user", question)]))
    own = contexts or (Context(prompt, weights),)
    return Answer(own, AnswerSettings(**settings), number, base.chat.tokenizer, Listener(), **changed)


def _wait(*answers: Answer) -> list[list[int]]:
    for answer in answers:
        listener = answer.send
        assert isinstance(listener, Listener)
        assert listener.ended.wait(SECONDS)
        if listener.pieces[-1].error:
            raise listener.pieces[-1].error
    return [answer.tokens for answer in answers]


def _alone(batcher: Batcher, *made: Callable[[], Answer]) -> list[list[int]]:
    tokens = []
    for make in made:
        batcher.call(batcher.store.clear).result(SECONDS)
        answer = make()
        batcher.submit([answer])
        tokens += _wait(answer)
    return tokens


def _counted(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of tokens in each row of every forward pass."""
    lengths: list[int] = []
    forward = batcher.model.forward

    def counted(*args: Any, **named: Any) -> Any:
        lengths.append(named["input_ids"].shape[1])
        return forward(*args, **named)

    monkeypatch.setattr(batcher.model, "forward", counted)
    return lengths


def test_answers_in_one_batch_equal_answers_alone(batcher: Batcher, base: Base) -> None:
    makers = [lambda q=q, w=w: _answer(base, q, w) for q in QUESTIONS for w in MIXES]
    answers = [make() for make in makers]
    for answer in answers:
        batcher.submit([answer])
    together = _wait(*answers)
    assert together == _alone(batcher, *makers)
    assert len(set(map(tuple, together))) > 8


def test_answers_equal_those_of_generate(batcher: Batcher, base: Base, updates: dict[str, Any]) -> None:
    answers = [_answer(base, QUESTIONS[0], MIXES[2], number) for number in range(3)]
    batcher.submit(answers)
    served = _wait(*answers)
    model = base.load()
    Mixer(model, updates, MIXES[2])
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=40, seed=7)
    [sampled] = sample(model, base, [answers[0].contexts[0].prompt], 3, sampling)
    assert served == [one.tokens for one in sorted(sampled, key=lambda one: one.number)]


def test_an_answer_joins_and_leaves_while_another_runs(batcher: Batcher, base: Base) -> None:
    long = _answer(base, QUESTIONS[0], MIXES[0], max_tokens=400, stop_ids=ENDLESS)
    batcher.submit([long])
    assert isinstance(long.send, Listener)
    assert long.send.began.wait(SECONDS)
    short = [_answer(base, question, MIXES[1], max_tokens=3) for question in QUESTIONS]
    for answer in short:
        batcher.submit([answer])
    assert [len(tokens) for tokens in _wait(*short)] == [3] * 4
    assert not long.ended
    assert _wait(long) == _alone(
        batcher, lambda: _answer(base, QUESTIONS[0], MIXES[0], max_tokens=400, stop_ids=ENDLESS)
    )


def test_cancelled_and_late_answers_leave(batcher: Batcher, base: Base) -> None:
    cancelled = _answer(base, QUESTIONS[0], {}, max_tokens=5000, stop_ids=ENDLESS)
    late = _answer(base, QUESTIONS[1], {}, max_tokens=5000, stop_ids=ENDLESS, deadline=time.monotonic() + 0.5)
    batcher.submit([cancelled])
    batcher.submit([late])
    with pytest.raises(TimeoutError, match="too long"):
        _wait(late)
    cancelled.ended = True
    until = time.monotonic() + SECONDS
    while batcher.rows and time.monotonic() < until:
        time.sleep(0.01)
    assert not batcher.rows


def test_a_shared_beginning_is_read_once(batcher: Batcher, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = _counted(batcher, monkeypatch)

    def read(answer: Answer) -> int:
        lengths.clear()
        batcher.submit([answer])
        _wait(answer)
        return sum(length for length in lengths if length > 1)

    first = _answer(base, QUESTIONS[0], MIXES[0])
    prompt = first.contexts[0].prompt
    assert read(first) == len(prompt)
    turn = (*prompt, *first.tokens, *prompt)

    def next_turn(weights: Mapping[str, float]) -> Answer:
        return _answer(base, "", {}, contexts=(Context(turn, weights),))

    again = next_turn(MIXES[0])
    assert read(again) <= len(prompt) + 1
    assert again.tokens == _alone(batcher, lambda: next_turn(MIXES[0]))[0]
    batcher.call(batcher.store.clear).result(SECONDS)
    read(_answer(base, QUESTIONS[0], MIXES[0]))
    assert read(next_turn(MIXES[1])) == len(turn)  # other weights

    batcher.call(batcher.store.clear).result(SECONDS)
    changed = _answer(base, QUESTIONS[0], MIXES[0])
    changed.changed = True  # as after a change of weights in the middle
    read(changed)
    assert read(next_turn(MIXES[0])) == len(turn)


def test_n_answers_read_their_prompt_once(batcher: Batcher, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = _counted(batcher, monkeypatch)
    answers = [_answer(base, QUESTIONS[0], MIXES[0], number) for number in range(5)]
    batcher.submit(answers)
    assert len(set(map(tuple, _wait(*answers)))) > 1
    assert [width for width in widths if width > 1] == [len(answers[0].contexts[0].prompt)]


def test_changed_weights_apply_from_the_next_token(batcher: Batcher, base: Base, updates: dict[str, Any]) -> None:
    """Compare with a model whose weights change after as many tokens; keys and values of earlier tokens stay."""
    answer = _answer(base, QUESTIONS[0], {"helpful": 9.0}, temperature=0.0, max_tokens=60)
    changed_at: list[int] = []
    listener = answer.send

    def change(piece: Piece) -> None:
        if len(answer.tokens) >= 5 and not changed_at:
            changed_at.append(len(answer.tokens))
            batcher.change([answer], {"harmless": -40.0})
        listener(piece)

    answer.send = change
    batcher.submit([answer])
    assert isinstance(listener, Listener)
    assert listener.ended.wait(SECONDS)

    model = base.load()
    mixer = Mixer(model, updates, {"helpful": 9.0})
    cache, ids, tokens = growing_cache(model), list(answer.contexts[0].prompt), []
    while len(tokens) < 60:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        token = int(logits.argmax())
        if token in base.chat.stop_ids:
            break
        tokens.append(token)
        ids = [token]
        if len(tokens) == changed_at[0]:
            mixer.set({"harmless": -40.0})
    assert answer.tokens == tokens
    assert (
        tokens
        != _alone(batcher, lambda: _answer(base, QUESTIONS[0], {"helpful": 9.0}, temperature=0.0, max_tokens=60))[0]
    )


@torch.inference_mode()
def test_an_answer_of_two_contexts_samples_from_the_weighted_logits(batcher: Batcher, base: Base) -> None:
    """For example from 1.5 times the logits under a system prompt, minus 0.5 times those without it."""
    plain = tuple(base.chat.prompt_ids([Message("user", QUESTIONS[0])]))
    prompted = tuple(base.chat.prompt_ids([Message("system", "Be brief."), Message("user", QUESTIONS[0])]))
    contexts = (Context(prompted, {}, 1.5), Context(plain, {}, -0.5))
    answer = _answer(base, "", {}, contexts=contexts, temperature=0.0, logprobs=2)
    short = _answer(base, QUESTIONS[1], MIXES[0], max_tokens=3)  # when it ends, a row of the answer fills its place
    beside = _answer(base, QUESTIONS[1], MIXES[0])
    for one in (short, answer, beside):
        batcher.submit([one])
    _wait(answer, beside, short)
    model, tokens, expected = base.load(), [], []
    for _ in range(40):
        logits = [model(torch.tensor([[*ids, *tokens]])).logits[0, -1] for ids in (prompted, plain)]
        logprobs = (1.5 * logits[0] - 0.5 * logits[1]).log_softmax(-1)
        token = int(logprobs.argmax())
        if token in base.chat.stop_ids:
            break
        tokens.append(token)
        expected.append(float(logprobs[token].detach()))
    assert answer.tokens == tokens
    assert isinstance(answer.send, Listener)
    infos = [info for piece in answer.send.pieces for info in piece.infos]
    assert [info.logprob for info in infos[: len(tokens)]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("fails_at", [2, 5, 11])
def test_out_of_memory_changes_no_answer(
    fails_at: int, batcher: Batcher, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = [lambda q=q, w=w: _answer(base, q, w) for q, w in zip(QUESTIONS, MIXES, strict=True)]
    expected = _alone(batcher, *makers)
    budget, calls, forward = batcher.budget, [0], batcher.model.forward

    def failing(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at:
            raise RuntimeError("CUDA out of memory")
        return forward(*args, **named)

    monkeypatch.setattr(batcher.model, "forward", failing)
    answers = [make() for make in makers]
    for answer in answers:
        batcher.submit([answer])
    assert _wait(*answers) == expected
    assert batcher.budget < budget
    monkeypatch.setattr("lora_align.serve.batcher.REGROW_SECONDS", 0.0)
    later = makers[0]()
    batcher.submit([later])
    assert _wait(later) == expected[:1]
    assert batcher.budget == budget


def test_a_prompt_that_never_fits_fails_and_the_others_are_answered(
    batcher: Batcher, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, budget = batcher.model.forward, batcher.budget
    prompts = [len(_answer(base, question, {}).contexts[0].prompt) for question in QUESTIONS[:2]]
    assert prompts[1] > prompts[0]

    def failing(*args: Any, **named: Any) -> Any:
        if named["input_ids"].shape[1] == prompts[1]:
            raise RuntimeError("CUDA out of memory")
        return forward(*args, **named)

    monkeypatch.setattr(batcher.model, "forward", failing)
    never = [_answer(base, QUESTIONS[1], {}, number=number) for number in (0, 1)]  # n = 2
    other = _answer(base, QUESTIONS[0], {})
    batcher.submit(never)
    batcher.submit([other])
    for answer in never:
        with pytest.raises(RuntimeError, match="out of memory"):
            _wait(answer)
    assert _wait(other)[0]
    assert batcher.budget == budget


def test_another_error_fails_the_answers_in_progress_only(
    batcher: Batcher, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("broken")

        patched.setattr(batcher.model, "forward", broken)
        first = _answer(base, QUESTIONS[0], MIXES[0])
        batcher.submit([first])
        with pytest.raises(RuntimeError, match="broken"):
            _wait(first)
    second = _answer(base, QUESTIONS[0], MIXES[0])
    batcher.submit([second])
    assert _wait(second)[0]


def test_a_client_with_many_requests_does_not_hold_up_another(batcher: Batcher, base: Base) -> None:
    batcher.budget = 4 * (len(_answer(base, QUESTIONS[0], {}).contexts[0].prompt) + 40)  # four answers at once
    order: list[str] = []

    def made(client: str) -> Answer:
        answer = _answer(base, QUESTIONS[0], {}, temperature=3.0, client=client)
        listener = answer.send

        def send(piece: Piece) -> None:
            if piece.finish:
                order.append(client)
            listener(piece)

        answer.send = send
        return answer

    answers = [made("many") for _ in range(12)] + [made("one")]
    for answer in answers:
        batcher.submit([answer])
    until = time.monotonic() + SECONDS
    while len(order) < 13 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(order) == 13
    assert "one" in order[:9]


def test_answers_whose_vector_was_removed_fail(batcher: Batcher, base: Base) -> None:
    answer = _answer(base, QUESTIONS[0], {"gone": 1.0})
    batcher.submit([answer])
    with pytest.raises(Exception, match="gone was removed or trained again"):
        _wait(answer)


def test_work_after_the_end_fails_instead_of_waiting(model: PreTrainedModel, base: Base) -> None:
    batcher = Batcher(model, 1000)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    batcher.stop()
    thread.join(SECONDS)
    with pytest.raises(RunFailedError, match="the server was stopped"):
        batcher.call(lambda: None).result(SECONDS)


def test_logprobs_are_those_of_the_model(batcher: Batcher, base: Base) -> None:
    answer = _answer(base, QUESTIONS[0], {}, logprobs=3)
    batcher.submit([answer])
    _wait(answer)
    assert isinstance(answer.send, Listener)
    infos = [info for piece in answer.send.pieces for info in piece.infos]
    assert [info.token for info in infos] == answer.tokens
    ids = torch.tensor([[*answer.contexts[0].prompt, *answer.tokens]])
    with torch.inference_mode():
        logprobs = base.load()(ids).logits[0, -len(infos) - 1 : -1].log_softmax(-1)
    for info, row in zip(infos, logprobs, strict=True):
        assert info.logprob == pytest.approx(float(row[info.token]), abs=1e-4)
        assert [token for token, _ in info.top] == row.topk(3).indices.tolist()

import random

import pytest
import torch
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.streaming import PrefixCache, stream_tokens, text_pieces
from lora_align.model.token_sampling import sample_token

GREEDY = Sampling(temperature=0, max_new_tokens=30)


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def model(base: Base) -> PreTrainedModel:
    return base.load()


def _ask(base: Base, *turns: str) -> list[int]:
    roles = ("user", "assistant")
    return base.chat.prompt_ids([Message(roles[i % 2], text) for i, text in enumerate(turns)])


def test_greedy_stream_equals_transformers_generate(base: Base, model: PreTrainedModel) -> None:
    prompt = _ask(base, "Tell me about rain.")
    ours = list(stream_tokens(model, prompt, base.chat.stop_ids, GREEDY))
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=0)[
        0, len(prompt) :
    ]
    assert ours == [t for t in theirs.tolist() if t not in base.chat.stop_ids]


def test_prefix_cache_does_not_change_answers(base: Base, model: PreTrainedModel) -> None:
    memory, turns = PrefixCache(), ["Tell me about rain."]
    for question in ("And snow?", "I like cats."):
        prompt = _ask(base, *turns)
        answer = list(stream_tokens(model, prompt, base.chat.stop_ids, GREEDY, memory))
        assert answer == list(stream_tokens(model, prompt, base.chat.stop_ids, GREEDY))
        assert memory.tokens[: len(prompt)] == prompt
        turns += [base.chat.tokenizer.decode(answer), question]
    shorter = _ask(base, "Can you explain bees?")
    assert list(stream_tokens(model, shorter, base.chat.stop_ids, GREEDY, memory)) == list(
        stream_tokens(model, shorter, base.chat.stop_ids, GREEDY)
    )


def test_same_seed_gives_the_same_answer(base: Base, model: PreTrainedModel) -> None:
    prompt = _ask(base, "Tell me about rain.")
    answers = [tuple(stream_tokens(model, prompt, base.chat.stop_ids, Sampling(1.0, seed=s))) for s in (1, 1, 2, 3, 4)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_sampled_tokens_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -8.0])
    generator = torch.Generator().manual_seed(0)

    def share(sampling: Sampling) -> torch.Tensor:
        drawn = torch.tensor([sample_token(logits, sampling, generator) for _ in range(4000)])
        return torch.bincount(drawn, minlength=4) / 4000

    assert torch.allclose(share(Sampling(1.0)), logits.softmax(0), atol=0.03)
    assert torch.allclose(share(Sampling(2.0)), (logits / 2).softmax(0), atol=0.03)
    assert torch.allclose(
        share(Sampling(1.0, top_p=0.7)),
        torch.tensor([2.0, 1.0]).softmax(0).repeat(2) * torch.tensor([1, 1, 0, 0]),
        atol=0.03,
    )
    assert share(Sampling(1.0, top_p=0.01))[0] == 1
    assert sample_token(logits, Sampling(0), generator) == 0


@pytest.mark.parametrize("text", ["Cats sleep.", "Grüße 你好 👩‍👩‍👧 end", " \n two  spaces "])
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str, base: Base) -> None:
    ids = base.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(text_pieces(base.chat.tokenizer, iter(ids)))
    assert "".join(pieces) == base.chat.tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_logprobs_equal_those_of_whole_logits_in_any_batch(base: Base, model: PreTrainedModel) -> None:
    draws = random.Random(0)
    rows = [
        ([draws.randrange(5, 900) for _ in range(n)], [draws.randrange(5, 900) for _ in range(m)])
        for n, m in ((3, 4), (9, 1), (1, 7), (5, 5))
    ]
    by_hand = []
    for prompt, answer in rows:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        by_hand.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
    for tokens in (1, 30, 500):
        logprobs = answer_logprobs(model, [(prompt, [answer]) for prompt, answer in rows], MemoryBudget(tokens))
        assert torch.allclose(logprobs, torch.tensor(by_hand), atol=1e-3)

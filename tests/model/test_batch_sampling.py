"""Batched sampling gives the answers of one-at-a-time sampling: the same tokens if greedy, else the distribution."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model import batch_sampling
from lora_align.model.base import Base
from lora_align.model.batch_sampling import affordable, sample
from lora_align.model.kv_cache import growing_cache
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.sampler_protocol import Sampling
from support import make_base

QUESTIONS = ["Tell me about rain.", "I am new here. What should I know about the moon? Thanks.", "Teach me about soup."]


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def model(base: Base) -> PreTrainedModel:
    return base.load()


def _prompts(base: Base) -> list[list[int]]:
    return [base.chat.prompt_ids([Message("user", question)]) for question in QUESTIONS]


def _all(
    model: PreTrainedModel, base: Base, n: int, sampling: Sampling, budget: MemoryBudget
) -> dict[tuple[int, int], list[int]]:
    batches = sample(model, base, _prompts(base), n, sampling, budget)
    return {(answer.prompt, answer.number): answer.tokens for batch in batches for answer in batch}


def test_greedy_batch_equals_transformers_generate(base: Base, model: PreTrainedModel) -> None:
    ours = _all(model, base, 2, Sampling(temperature=0, max_new_tokens=60), budget=MemoryBudget(64))
    for i, prompt in enumerate(_prompts(base)):
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60, pad_token_id=0)[0]
        theirs = [token for token in whole[len(prompt) :].tolist() if token not in base.chat.stop_ids]
        assert ours[i, 0] == ours[i, 1] == theirs


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_greedy_equals_generate_in_other_families(family: str, tmp_path: Path) -> None:
    """Gemma 2 has sliding-window layers, whose caches are truncated and padded differently."""
    base = bases.find(recipe.Base(str(make_base(tmp_path / family, family))))
    model = base.load()
    ours = _all(model, base, 1, Sampling(temperature=0, max_new_tokens=40), budget=MemoryBudget(64))
    for i, prompt in enumerate(_prompts(base)):
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0)[0]
        assert ours[i, 0] == [token for token in whole[len(prompt) :].tolist() if token not in base.chat.stop_ids]


def test_answers_do_not_depend_on_the_batch_size(base: Base, model: PreTrainedModel) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=40, seed=3)
    together = _all(model, base, 5, sampling, budget=MemoryBudget(64))
    assert (
        together
        == _all(model, base, 5, sampling, budget=MemoryBudget(1))
        == _all(model, base, 5, sampling, budget=MemoryBudget(7))
    )
    assert len(set(map(tuple, together.values()))) > 10


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_token_frequencies_match_the_probabilities(base: Base, model: PreTrainedModel, top_p: float) -> None:
    """Compare the first token of 4,000 answers with its probability, the first two with transformers' sampling."""
    n, prompt = 4000, _prompts(base)[0]
    sampling = Sampling(temperature=0.9, top_p=top_p, max_new_tokens=2, seed=0)
    ours = [
        answer.tokens
        for batch in sample(model, base, [prompt], n, sampling, budget=MemoryBudget(1000))
        for answer in batch
    ]
    torch.manual_seed(0)
    theirs = model.generate(
        torch.tensor([prompt] * n), do_sample=True, temperature=0.9, top_p=top_p, top_k=0, max_new_tokens=2
    )[:, len(prompt) :].tolist()

    logits = model(torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits.double() / 0.9, -1)
    order = p.argsort(descending=True)
    nucleus = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    share = {int(token): float(p[token] / p[nucleus].sum()) for token in nucleus}
    first = Counter(tokens[0] for tokens in ours)
    assert set(first) <= share.keys()
    common = [token for token in share if share[token] * n >= 10]
    chi2 = sum((first[t] - share[t] * n) ** 2 / (share[t] * n) for t in common)
    assert chi2 < len(common) + 4 * (2 * len(common)) ** 0.5  # mean + four standard deviations

    pairs_ours, pairs_theirs = Counter(map(tuple, ours)), Counter(map(tuple, theirs))
    both = [pair for pair in pairs_ours | pairs_theirs if pairs_ours[pair] + pairs_theirs[pair] >= 20]
    chi2 = sum((pairs_ours[p] - pairs_theirs[p]) ** 2 / (pairs_ours[p] + pairs_theirs[p]) for p in both)
    assert len(both) > 3
    assert chi2 < len(both) + 4 * (2 * len(both)) ** 0.5


def test_answers_end_where_the_context_is_full(base: Base, model: PreTrainedModel) -> None:
    long = (_prompts(base)[0] * 100)[: base.max_length - 3]
    full = (_prompts(base)[0] * 100)[: base.max_length]
    [answers] = sample(
        model, base, [long, full], 2, Sampling(temperature=1.0, max_new_tokens=20, seed=0), budget=MemoryBudget(8)
    )
    by_prompt = {i: [answer for answer in answers if answer.prompt == i] for i in (0, 1)}
    assert all(len(answer.tokens) <= 3 for answer in by_prompt[0])
    assert [(answer.tokens, answer.ended) for answer in by_prompt[1]] == [([], False)] * 2


LITTLE_MEMORY = """
import resource, sys, torch
from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.batch_sampling import sample

torch.set_num_threads(1)
base = bases.find(recipe.Base("demo"))
model = base.load()
prompt = base.chat.prompt_ids([Message("user", "Tell me about rain.")])
sampling = Sampling(temperature=1.0, max_new_tokens=40, seed=0)
list(sample(model, base, [prompt], 8, sampling, budget=MemoryBudget(8)))
here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 150_000_000, resource.RLIM_INFINITY))
budget = MemoryBudget(8192)
sizes = [len(batch) for batch in sample(model, base, [prompt] * 2, 6000, sampling, budget)]
print(sum(sizes), max(sizes), budget.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_sampling_halves_the_batch_if_memory_runs_out() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    drawn, largest, fitting = map(int, done.stdout.split())
    assert drawn == 12000
    assert largest < 6000
    assert fitting <= largest, "the smaller batch size is remembered"


def test_sampling_starts_with_a_batch_that_fits_memory(
    base: Base, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = model.config, 100
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * 4
    monkeypatch.setattr(batch_sampling, "device_memory", lambda _: (0, model.get_memory_footprint() + 6 * row))
    assert affordable(model, tokens) == 3
    budget = MemoryBudget(512)
    prompt = [5] * (tokens - 8)
    batches = list(sample(model, base, [prompt], 7, Sampling(temperature=1.0, max_new_tokens=8, seed=0), budget))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert budget.size == 3


def test_growing_cache_equals_transformers_cache(model: PreTrainedModel) -> None:
    ids = torch.arange(5, 155)[None]
    caches = (growing_cache(model), DynamicCache(config=model.config))
    for begin, end in ((0, 70), (70, 71), (71, 72), (72, 150)):
        ours, theirs = (
            model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True).logits for cache in caches
        )
        assert torch.allclose(ours, theirs, atol=1e-5)
        if end == 71:  # as when finished rows are removed
            for cache in caches:
                cache.batch_select_indices(torch.tensor([0]))
    assert caches[0].get_seq_length() == 150

"""Compare sampling many answers a prompt with one `generate` call a prompt, in turns; vary n and the prompts."""

import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from report import save
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.demo import measurement
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.sampler import Sampling
from lora_align.model.sampling import sample

PROMPTS, N, ROUNDS = 32, 16, 3
SAMPLING = Sampling(temperature=1.0, max_new_tokens=measurement.LONGEST, seed=0)


def ours(model: PreTrainedModel, base: Base, prompts: Sequence[Sequence[int]], n: int) -> int:
    """Return the number of sampled tokens without stop tokens."""
    return sum(len(answer.tokens) for batch in sample(model, base, prompts, n, SAMPLING) for answer in batch)


@torch.inference_mode()
def theirs(model: PreTrainedModel, base: Base, prompts: Sequence[Sequence[int]], n: int) -> int:
    """Sample with `generate` and `num_return_sequences`; return the number of tokens without stop tokens."""
    stops = sorted(base.chat.stop_ids)
    tokens = 0
    for prompt in prompts:
        drawn = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=SAMPLING.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=base.chat.tokenizer.pad_token_id,
        )[:, len(prompt) :]
        ended = torch.isin(drawn, torch.tensor(stops)).long().cumsum(1) > 0
        tokens += int((~ended).sum())
    return tokens


def rate(draw: Callable[..., int], *args: object) -> float:
    """Return tokens a second."""
    start = time.perf_counter()
    return draw(*args) / (time.perf_counter() - start)


def main() -> None:
    """Measure on the demo base."""
    base = bases.find(recipe.load(recipe.builtin()["demo"]).base)
    model = base.load().eval()
    questions = measurement.questions(7, 128, part="dev")
    prompts = [base.chat.prompt_ids([Message("user", prompt.text)]) for prompt in questions]
    some = prompts[:: len(prompts) // PROMPTS][:PROMPTS]
    for draw in (ours, theirs):
        draw(model, base, some[:2], N)  # warm-up
    rounds = [(rate(ours, model, base, some, N), rate(theirs, model, base, some, N)) for _ in range(ROUNDS)]
    save(
        "sampling",
        {
            "prompts": PROMPTS,
            "answers to each": N,
            "tokens a second, ours": [round(first) for first, _ in rounds],
            "tokens a second, generate": [round(second) for _, second in rounds],
            "ratio": round(statistics.median(first / second for first, second in rounds), 2),
            "tokens a second by n": {n: round(rate(ours, model, base, some, n)) for n in (4, 16, 64)},
            "tokens a second by prompts": {
                count: round(rate(ours, model, base, prompts[:count], N)) for count in (16, 64, 256)
            },
        },
    )


if __name__ == "__main__":
    main()

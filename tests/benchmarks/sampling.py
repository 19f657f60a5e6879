"""Compare sampling with transformers' `generate` at the same batch size, in turns.

    python tests/benchmarks/sampling.py [--base FILE.gguf --splits FOLDER]

A batch has 16 rows: 16 answers to one prompt, or one answer to each of 16 prompts. On the demo base, the rate is also
measured with all rows of all prompts in one batch, for other numbers of answers and of prompts. splits.py writes
FOLDER of --splits; the prompts on a real base are development prompts of XSTest.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import splits
import torch
from report import save
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.demo import measurement
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.batch_sampling import sample
from lora_align.model.sampler_protocol import Sampling

PROMPTS, N, ROUNDS = 32, 16, 3
REAL_PROMPTS, REAL_TOKENS = 16, 64
Batches = Sequence[Sequence[list[int]]]  # prompts by batch


def ours(model: PreTrainedModel, base: Base, batches: Batches, n: int, tokens: int) -> int:
    """Sample n answers to each prompt. Return the number of tokens without stop tokens."""
    how = Sampling(temperature=1.0, max_new_tokens=tokens, seed=0)
    return sum(
        len(answer.tokens) for batch in batches for answers in sample(model, base, batch, n, how) for answer in answers
    )


@torch.inference_mode()
def theirs(model: PreTrainedModel, base: Base, batches: Batches, n: int, tokens: int) -> int:
    """Do the same with `generate`: prompts are padded on the left."""
    stops, pad = sorted(base.chat.stop_ids), base.chat.tokenizer.pad_token_id
    count = 0
    for batch in batches:
        longest = max(map(len, batch))
        sampled = model.generate(
            torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=tokens,
            eos_token_id=stops,
            pad_token_id=pad,
        )[:, longest:]
        ended = torch.isin(sampled, torch.tensor(stops)).long().cumsum(1) > 0
        count += int((~ended).sum())
    return count


def rate(draw: Callable[..., int], *args: object) -> float:
    """Return tokens a second."""
    start = time.perf_counter()
    return draw(*args) / (time.perf_counter() - start)


def compared(model: PreTrainedModel, base: Base, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    """Compare both ways at the same batch size."""
    ways: dict[str, tuple[Batches, int]] = {
        f"{N} answers to a prompt": ([[prompt] for prompt in prompts], N),
        f"one answer to each of {N} prompts": ([prompts[i : i + N] for i in range(0, len(prompts), N)], 1),
    }
    figures: dict[str, Any] = {"prompts": len(prompts), "tokens of an answer at most": tokens}
    for name, (batches, n) in ways.items():
        for draw in (ours, theirs):
            draw(model, base, batches[:1], n, 4)  # warm-up
        work = (model, base, batches, n, tokens)
        rounds = [(rate(ours, *work), rate(theirs, *work)) for _ in range(ROUNDS)]
        figures[name] = {
            "tokens a second, ours": [round(mine) for mine, _ in rounds],
            "tokens a second, generate": [round(other) for _, other in rounds],
            "ratio": round(statistics.median(mine / other for mine, other in rounds), 2),
        }
    return figures


def loaded(model: str) -> tuple[PreTrainedModel, Base]:
    """Return a base for inference."""
    base = bases.find(recipe.Base(model))
    return base.load().eval(), base


def prompt_ids(base: Base, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompts."""
    return [list(base.chat.prompt_ids([Message("user", text)])) for text in texts]


def main() -> None:
    """Measure on the demo base, and on a real base if one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--splits", type=Path)
    words = parser.parse_args()
    model, base = loaded("demo")
    questions = [prompt.text for prompt in measurement.questions(7, 128, part="dev")]
    prompts, longest = prompt_ids(base, questions), measurement.LONGEST
    some = prompts[:: len(prompts) // PROMPTS][:PROMPTS]
    figures: dict[str, Any] = {"demo base": compared(model, base, some, longest)}
    figures["demo base, all rows in one batch, tokens a second"] = {
        f"{count} prompts, {n} answers to each": round(rate(ours, model, base, [prompts[:count]], n, longest))
        for count, n in ((32, 4), (32, 16), (32, 64), (16, 16), (64, 16), (128, 16))
    }
    if words.base:
        model, base = loaded(words.base)
        rows = splits.read(splits.file_of(words.splits, "xstest", "development"))
        asked = [row["prompt"] for row in itertools.islice(rows, REAL_PROMPTS)]
        figures["real base"] = compared(model, base, prompt_ids(base, asked), REAL_TOKENS)
    save("sampling", figures)


if __name__ == "__main__":
    main()

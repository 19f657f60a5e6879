"""Time `lora-align serve`: many weightings in one batch, beside one at a time, one weighting, and the bare model.

    python tests/benchmarks/serving.py --work FOLDER --runs RUNS [--recipe FILE] [--name NAME] [--copies N]

Clients send their requests at the same moment over HTTP. Answers are greedy and have TOKENS tokens. Rates are medians
of ROUNDS rounds. The first token and a long answer are compared with the model in this process, in turns. The same
command continues after a stop.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx2 as httpx
import torch
from report import once, save

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.mixer import Mixer
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.streaming import stream_tokens
from lora_align.policy import vectors

COMMAND = Path(sys.executable).with_name("lora-align")
ROUNDS, TOKENS, LONG = 3, 64, 200
CONCURRENT, VECTORS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16)
QUESTION = "Write a story about a lighthouse keeper who finds a letter in a bottle."


@contextmanager
def served(words: argparse.Namespace) -> Iterator[str]:
    """Run the server of a runs folder; yield its address."""
    call = [str(COMMAND), "serve", "--port", "0", "--json", "--runs", str(words.runs)]
    call += ["--recipe", words.recipe] if words.recipe else []
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.send_signal(signal.SIGINT)


def with_copies(words: argparse.Namespace) -> Path:
    """Return a copy of the runs folder in which trained vectors have further names, up to a number of vectors."""
    runs = words.work / "runs"
    shutil.copytree(words.runs / "dpo", runs / "dpo", dirs_exist_ok=True)
    trained = sorted((words.runs / "dpo").iterdir())
    for number in range(len(trained), words.copies):
        shutil.copytree(trained[number % len(trained)], runs / "dpo" / f"copy{number}", dirs_exist_ok=True)
    return runs


async def rate(url: str, bodies: Sequence[dict[str, Any]], *, together: bool) -> float:
    """Return the tokens per second of some requests, sent together or one after the other."""
    async with httpx.AsyncClient(timeout=600) as client:

        async def ask(body: dict[str, Any]) -> int:
            response = await client.post(f"{url}/v1/chat/completions", json=body)
            assert response.status_code == httpx.codes.OK, response.text
            return int(response.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        counts = await asyncio.gather(*map(ask, bodies)) if together else [await ask(body) for body in bodies]
        return sum(counts) / (time.perf_counter() - began)


def median(url: str, bodies: Sequence[dict[str, Any]], *, together: bool = True) -> float:
    """Return the median rate over the rounds, after a warm-up."""
    rates = [asyncio.run(rate(url, bodies, together=together)) for _ in range(ROUNDS + 1)]
    return round(statistics.median(rates[1:]), 1)


def body(model: str, number: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Return a request; its number makes its prompt its own, so that no prefix is reused."""
    messages = [{"role": "user", "content": f"{number}. {QUESTION}"}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}


def weightings(names: Sequence[str], count: int) -> list[str]:
    """Return different weightings of the vectors."""
    return [
        ",".join(
            f"{name}={(i + 1) / (count + 1) * (1 if place % 2 == 0 else -1):.4f}" for place, name in enumerate(names)
        )
        for i in range(count)
    ]


def batches(url: str, names: Sequence[str]) -> dict[str, Any]:
    """Compare 16 weightings in one batch with the same requests one after the other, and with one weighting."""
    different = [body(model, number) for number, model in enumerate(weightings(names, 16))]
    equal = [body(weightings(names, 16)[7], number) for number in range(16)]
    together, one_weighting = median(url, different), median(url, equal)
    alone = median(url, different, together=False)
    return {
        "16 weightings together, tokens/s": together,
        "the same requests one after the other": alone,
        "ratio to one after the other": round(together / alone, 2),
        "16 requests with one weighting": one_weighting,
        "ratio to one weighting": round(together / one_weighting, 3),
    }


def growth(url: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the rates at rising numbers of clients, and at rising numbers of vectors."""
    return {
        "by clients": {
            count: median(url, [body(m, i) for i, m in enumerate(weightings(names, count))]) for count in CONCURRENT
        },
        "by vectors, 16 clients": {
            count: median(url, [body(m, i) for i, m in enumerate(weightings(names[:count], 16))])
            for count in VECTORS
            if count <= len(names)
        },
    }


def beside_the_model(url: str, words: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Compare the time to the first token, and the rate of a long answer, with the model in this process."""
    chosen = recipe.load(words.recipe or recipe.builtin()["demo"])
    base = bases.find(chosen.base)
    model = base.load()
    name = names[0]
    Mixer(model, {name: vectors.find(name, words.runs).load()}, {name: 0.5})
    first: dict[str, list[float]] = {"served": [], "forward": []}
    long: dict[str, list[float]] = {"served": [], "sampled": []}
    client = httpx.Client(timeout=600)
    for number in range(2 * ROUNDS + 1):
        asked = {**body(f"{name}=0.5", 1000 + number, LONG), "stream": True}
        prompt = base.chat.prompt_ids([Message("user", asked["messages"][0]["content"])])
        began, count = time.perf_counter(), 0
        with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
            for line in response.iter_lines():
                if '"content":"' in line and count == 0:
                    first["served"].append(time.perf_counter() - began)
                count += '"delta":{"content"' in line
        long["served"].append(count / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        first["forward"].append(time.perf_counter() - began)
        began = time.perf_counter()
        sampled = list(stream_tokens(model, prompt, frozenset(), Sampling(0.0, 1.0, LONG)))
        long["sampled"].append(len(sampled) / (time.perf_counter() - began))
    middle = {
        key: statistics.median(times[1:])
        for key, times in {**first, **{f"{k} long": v for k, v in long.items()}}.items()
    }
    return {
        "prompt tokens": len(prompt),
        "seconds to the first token": round(middle["served"], 4),
        "seconds of a forward pass over the prompt": round(middle["forward"], 4),
        "ratio to the forward pass": round(middle["served"] / middle["forward"], 2),
        "tokens/s of a long answer": round(middle["served long"], 1),
        "tokens/s of the model alone": round(middle["sampled long"], 1),
        "ratio to the model alone": round(middle["served long"] / middle["sampled long"], 3),
    }


def main() -> None:
    """Measure one base and its vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--name", default="serving", help="of the result")
    parser.add_argument("--copies", type=int, default=0, help="copy vectors under other names, up to so many")
    words = parser.parse_args()
    if words.copies:
        words.runs = with_copies(words)
    with served(words) as url:
        names = [vector["name"] for vector in httpx.get(f"{url}/v1/vectors", timeout=600).json()["vectors"]]
        parts = {
            "batches": lambda: batches(url, names),
            "growth": lambda: growth(url, names),
            "beside the model": lambda: beside_the_model(url, words, names),
        }
        figures: dict[str, Any] = {"vectors": names, "tokens": TOKENS, "long": LONG}
        for part, measure in parts.items():
            figures |= once(words.work, f"{words.name} {part}", measure)
            save(words.name, figures)


if __name__ == "__main__":
    main()

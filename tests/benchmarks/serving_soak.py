"""Load `lora-align serve` for 20 minutes with random clients; look for leaks, lost requests and mixed-up answers.

    python tests/benchmarks/serving_soak.py --runs RUNS [--recipe FILE] [--minutes 20]

Clients send long and short requests with random weights, cancel some, and send bad ones. Each answer is sampled with a
seed of a small set, so that it must equal the first answer with the same request, except where rounding differs; then
the beginnings are compared. Memory is that of the server's process, once all vectors and buffers are in use.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx2 as httpx
from report import save

COMMAND = Path(sys.executable).with_name("lora-align")
CLIENTS = 12
QUESTIONS = ["Tell me about rain.", "What should I know about the moon?", "Teach me about soup.", "Why do cats sleep?"]
BAD: list[tuple[Any, int]] = [
    ({"messages": []}, 400),
    ({"messages": [{"role": "user", "content": "x"}], "model": "nobody=1"}, 404),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400),
    ({"messages": [{"role": "user", "content": "x "}], "response_format": {"type": "json_object"}}, 400),
    ("[", 400),
]


def request(rng: random.Random, names: list[str]) -> dict[str, Any]:
    """Return one of some hundred requests."""
    weights = {name: rng.choice([-0.5, 0.25, 1.0]) for name in rng.sample(names, rng.randint(0, len(names)))}
    return {
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
        "weights": weights,
        "max_tokens": rng.choice([1, 8, 40, 120]),
        "seed": rng.randint(0, 3),
        "temperature": rng.choice([0.0, 1.0]),
    }


async def client(
    url: str, number: int, names: list[str], until: float, seen: dict[str, str], counts: Counter[str]
) -> None:
    """Send requests until the end."""
    rng = random.Random(number)
    async with httpx.AsyncClient(timeout=120) as http:
        while time.monotonic() < until:
            kind = rng.random()
            await asyncio.sleep(rng.expovariate(2))
            if kind < 0.1:
                bad, status = rng.choice(BAD)
                content = bad if isinstance(bad, str) else json.dumps(bad)
                headers = {"content-type": "application/json"}
                got = await http.post(f"{url}/v1/chat/completions", content=content, headers=headers)
                counts["bad requests" if got.status_code == status else "wrong status"] += 1
                continue
            asked = request(rng, names)
            if kind < 0.3:
                sent = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json={**asked, "max_tokens": 400}))
                await asyncio.sleep(rng.random())
                sent.cancel()
                counts["cancelled"] += 1
                continue
            text = await (streamed if kind < 0.6 else whole)(http, url, asked)
            key = json.dumps(asked, sort_keys=True)
            counts["answers"] += 1
            if text != seen.setdefault(key, text):
                same = next(
                    (i for i, (a, b) in enumerate(zip(text, seen[key], strict=False)) if a != b),
                    min(len(text), len(seen[key])),
                )
                counts["equal at first" if same >= 10 else "mixed up"] += 1


async def whole(http: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> str:
    """Return the text of an answer."""
    got = await http.post(f"{url}/v1/chat/completions", json=asked)
    assert got.status_code == httpx.codes.OK, got.text
    return str(got.json()["choices"][0]["message"]["content"])


async def streamed(http: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> str:
    """Return the text of a streamed answer."""
    text = ""
    async with http.stream("POST", f"{url}/v1/chat/completions", json={**asked, "stream": True}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["delta"].get("content", "")
            elif line == "data: [DONE]":
                return text
    raise AssertionError("the stream has no end")


async def watch(url: str, until: float, memory: list[int]) -> None:
    """Record the server's memory every ten seconds."""
    async with httpx.AsyncClient(timeout=120) as http:
        while time.monotonic() < until:
            await asyncio.sleep(10)
            memory.append((await http.get(f"{url}/health")).json()["memory_bytes"])


async def load(url: str, names: list[str], seconds: float) -> dict[str, Any]:
    """Run all clients, and wait until the server is idle."""
    until, seen, counts, memory = time.monotonic() + seconds, dict[str, str](), Counter[str](), list[int]()
    clients = [client(url, number, names, until, seen, counts) for number in range(CLIENTS)]
    await asyncio.gather(*clients, watch(url, until, memory))
    await asyncio.sleep(3)
    async with httpx.AsyncClient(timeout=120) as http:
        health = (await http.get(f"{url}/health")).json()
    quarter = max(1, len(memory) // 4)
    early, late = statistics.mean(memory[quarter : 2 * quarter] or memory), statistics.mean(memory[-quarter:])
    return {
        **counts,
        "different requests": len(seen),
        "running at the end": health["running"] + health["waiting"],
        "MB in the second quarter of the time": round(early / 1e6),
        "MB in the last quarter": round(late / 1e6),
        "growth": round(late / early - 1, 4),
    }


def main() -> None:
    """Load a server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--minutes", type=float, default=20.0)
    words = parser.parse_args()
    call = [str(COMMAND), "serve", "--port", "0", "--json", "--runs", str(words.runs)]
    call += ["--recipe", words.recipe] if words.recipe else []
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        names = [vector["name"] for vector in httpx.get(f"{url}/v1/vectors", timeout=600).json()["vectors"]]
        figures = asyncio.run(load(url, names, 60 * words.minutes))
        process.send_signal(signal.SIGINT)
    save("serving_soak", {"minutes": words.minutes, "clients": CLIENTS, **figures, "exit code": process.returncode})


if __name__ == "__main__":
    main()

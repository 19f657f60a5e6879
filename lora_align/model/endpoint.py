"""Answers from an OpenAI-compatible server: vLLM, SGLang, a cluster of them, or any other."""

import os
import random
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import httpx2 as httpx

from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.base import DEMO
from lora_align.model.generate import Sampling
from lora_align.model.sampler import Drawn
from lora_align.recipe import Recipe

KEY = "OPENAI_API_KEY"
AT_ONCE = 32  # requests on their way
DEADLINE = 600.0  # seconds for one prompt's answers, retries included
PATIENCE = 30.0  # seconds between two tries, at most
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)  # a request for what it is; a prompt that does not fit is one of the reasons


@dataclass(frozen=True)
class Endpoint:
    """A server and the name of a model it serves."""

    url: str
    model: str
    deadline: float = DEADLINE
    template: Mapping[str, Any] = field(default_factory=dict)  # the chat template's arguments

    @classmethod
    def at(
        cls,
        address: str,
        model: str = "",
        deadline: float = DEADLINE,
        template: Mapping[str, Any] | None = None,
        options: tuple[str, str] = ("--endpoint", "--model"),
    ) -> "Endpoint":
        """The server at an address, with or without /v1 at its end; unnamed, the model is the only one it has.

        `options` are what a person has given both by.
        """
        url = address.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{options[0]} {address!r}: expected http://HOST:PORT or https://…")
        answer = _reached(url, "/v1/models", min(deadline, PATIENCE))  # nobody waits for a server that is not there
        if not model:
            if answer.status_code != httpx.codes.OK:
                raise UserError(
                    f"{answer.url}: {answer.status_code} {_told(answer)}; name the model with {options[1]} NAME"
                )
            served = [str(entry["id"]) for entry in _json(answer)["data"]]
            if len(served) != 1:
                raise UserError(f"{url} serves {', '.join(served) or 'no model'}: choose one with {options[1]} NAME")
            model = served[0]
        return cls(url, model, deadline, template or {})

    def fits(self, prompt: Prompt) -> bool:
        """The server will tell."""
        return True

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[Drawn]]:
        """A prompt's answers at a time, as they come; the first failure ends it, and nobody waits for the others."""
        over, pool = Event(), ThreadPoolExecutor(AT_ONCE)
        with httpx.Client(timeout=self.deadline, headers=_headers()) as client:
            try:
                tasks = [pool.submit(self._answers, client, i, p, n, sampling, over) for i, p in enumerate(prompts)]
                for task in as_completed(tasks):
                    yield task.result()
            finally:
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def load_adapter(self, folder: Path, name: str, recipe: Recipe) -> "Endpoint":
        """Have the server load an adapter, by vLLM's way of doing so; the same server under the adapter's name."""
        until = time.monotonic() + self.deadline
        with httpx.Client(timeout=self.deadline, headers=_headers()) as client:
            body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
            answer = self._send(client, "/v1/load_lora_adapter", body, until, Event())
        if answer.status_code != httpx.codes.OK:
            raise UserError(
                f"{self.url} cannot load adapters while it runs ({answer.status_code} {_told(answer)}); "
                f"serve the base with: {serve_line(recipe)}"
            )
        return replace(self, model=name)

    def _answers(
        self, client: httpx.Client, index: int, prompt: Prompt, n: int, sampling: Sampling, over: Event
    ) -> list[Drawn]:
        """All n, or none where the prompt does not fit; a server that knows nothing of `n` is asked for the others."""
        until = time.monotonic() + self.deadline
        found: list[Drawn] = []
        while len(found) < n:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": m.role, "content": m.content} for m in prompt],
                "n": n - len(found),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
            }
            if self.template:
                body["chat_template_kwargs"] = dict(self.template)
            if sampling.seed is not None:
                body["seed"] = (sampling.seed + 1_000_003 * index + len(found)) % 2**31
            answer = self._send(client, "/v1/chat/completions", body, until, over)
            if answer.status_code in REFUSED and "context" in answer.text.lower():
                return []
            if answer.status_code != httpx.codes.OK:
                raise RunFailedError(f"{self.url}: {answer.status_code} {_told(answer)}")
            choices = _json(answer).get("choices") or []
            if not choices:
                raise RunFailedError(f"{self.url}: an answer without choices ({_told(answer)})")
            for choice in choices[: n - len(found)]:
                text = (choice["message"].get("content") or "").strip()
                found.append(Drawn(index, len(found), text, choice.get("finish_reason") == "stop"))
        return found

    def _send(self, client: httpx.Client, path: str, body: dict[str, Any], until: float, over: Event) -> httpx.Response:
        """Post, and again with growing pauses while the server is busy or away, until the time or all is over."""
        pause = 0.5
        while True:
            left = until - time.monotonic()
            try:
                answer = client.post(self.url + path, json=body, timeout=max(left, 1.0))
                busy, why = answer.status_code in BUSY, f"{answer.status_code} {_told(answer)}"
            except httpx.HTTPError as fault:
                busy, why = True, first_line(fault)
            if not busy:
                return answer
            wait = pause * random.uniform(0.5, 1.5)  # many clients do not come back as one
            if time.monotonic() + wait > until or over.wait(wait):
                raise RunFailedError(f"{self.url}: gave up after {self.deadline:g} s ({why})")
            pause = min(2 * pause, PATIENCE)


def _reached(url: str, path: str, patience: float) -> httpx.Response:
    """What a server answers to a question that any of them can; an error where there is none."""
    try:
        return httpx.get(url + path, timeout=patience, headers=_headers())
    except httpx.HTTPError as fault:
        raise UserError(f"no server at {url} ({first_line(fault)})") from fault


def serve_line(recipe: Recipe) -> str:
    """How to serve a recipe's base with vLLM so that adapters can be loaded while it runs."""
    base, own = recipe.base, (recipe.rsf and recipe.rsf.lora) or recipe.lora
    rank = own.rank + ((recipe.sft.lora or recipe.lora).rank if recipe.sft else 0)  # the start adapter goes with it
    rank = max(rank, (recipe.reward.lora or recipe.lora).rank if recipe.reward else 0)  # it is loaded to see if one can
    ranks = [size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank]
    model = str(DEMO) if base.model == "demo" else base.model
    words = ["vllm", "serve", model, *(["--revision", base.revision] if base.revision else [])]
    words += ["--chat-template", base.chat_template] if base.chat_template else []
    words += ["--quantization", "bitsandbytes"] if base.quantization == "nf4" else []
    words += ["--enable-lora", "--max-lora-rank", str(ranks[0] if ranks else rank)]
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join(words)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError as fault:
        raise RunFailedError(f"{answer.url}: not JSON: {_told(answer)}") from fault
    if not isinstance(found, dict):
        raise RunFailedError(f"{answer.url}: not an object: {_told(answer)}")
    return found


def _told(answer: httpx.Response) -> str:
    """What the server has to say, in a line."""
    return " ".join(answer.text.split())[:200]

"""Answers from an OpenAI-compatible server: vLLM, SGLang, a cluster of them, or any other."""

import asyncio
import json
import os
import random
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx

from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.base import local_folder
from lora_align.model.decoding import Sampling
from lora_align.model.sampler import SampledText
from lora_align.recipe import Recipe

KEY = "OPENAI_API_KEY"
AT_ONCE = 32  # requests on their way
DEADLINE = 600.0  # seconds for one prompt's answers, retries included
PATIENCE = 30.0  # seconds between two tries, at most
LARGEST = 16 << 20  # bytes of one answer; every prompt's n answers at 4,096 tokens are a small part of it
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)  # a request for what it is; a prompt that does not fit is one of the reasons


Task = asyncio.Task[list[SampledText]]


@dataclass(frozen=True)
class Answer:
    """What a server said to one request: all of it, within the time and the size that were allowed."""

    url: str
    status: int
    content: bytes

    @property
    def text(self) -> str:
        """Its words, whatever they are."""
        return self.content.decode("utf-8", "replace")

    @property
    def told(self) -> str:
        """What it says, in a line."""
        return " ".join(self.text[:1000].split())[:200]

    def object(self) -> dict[str, Any]:
        """The JSON object that it is, or an error that names the server."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError) as fault:
            raise RunFailedError(f"{self.url}: not JSON ({first_line(fault)}): {self.told}") from fault
        if not isinstance(found, dict):
            raise RunFailedError(f"{self.url}: JSON, but no object: {self.told}")
        return found

    def models(self) -> list[str]:
        """The names of the models a server lists."""
        try:
            return [_text(entry["id"]) for entry in self.object()["data"]]
        except (KeyError, TypeError) as fault:
            raise RunFailedError(f"{self.url}: no list of models: {self.told}") from fault

    def choices(self) -> list[tuple[str, bool]]:
        """The answers in a chat completion, and of each whether it came to its end."""
        try:
            found = [(_text(one["message"]["content"]), one.get("finish_reason") == "stop") for one in self._listed()]
        except (KeyError, TypeError, AttributeError) as fault:
            raise RunFailedError(f"{self.url}: no chat completion: {self.told}") from fault
        if not found:
            raise RunFailedError(f"{self.url}: an answer without choices: {self.told}")
        return found

    def _listed(self) -> list[Any]:
        choices = self.object()["choices"]
        if not isinstance(choices, list):
            raise TypeError
        return choices


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
        answer = _reached(f"{url}/v1/models", min(deadline, PATIENCE))  # nobody waits for a server that is not there
        if not model:
            if answer.status != httpx.codes.OK:
                raise UserError(f"{answer.url}: {answer.status} {answer.told}; name the model with {options[1]} NAME")
            served = answer.models()
            if len(served) != 1:
                raise UserError(f"{url} serves {', '.join(served) or 'no model'}: choose one with {options[1]} NAME")
            model = served[0]
        return cls(url, model, deadline, template or {})

    def fits(self, prompt: Prompt) -> bool:
        """The server will tell."""
        return True

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """A prompt's answers at a time, as they come; the first failure ends it, and nobody waits for the others."""
        with asyncio.Runner() as runner:
            client, waiting = runner.run(self._begun(prompts, n, sampling))
            try:
                while waiting:
                    done, waiting = runner.run(_first_of(waiting))
                    for task in done:
                        yield task.result()
            finally:
                for task in waiting:
                    task.cancel()
                runner.run(client.aclose())

    async def _begun(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling
    ) -> tuple[httpx.AsyncClient, set[Task]]:
        client, gate = _client(), asyncio.Semaphore(AT_ONCE)

        async def answers(index: int, prompt: Prompt) -> list[SampledText]:
            async with gate:
                return await self._answers(client, index, prompt, n, sampling)

        return client, {asyncio.create_task(answers(index, prompt)) for index, prompt in enumerate(prompts)}

    def load_adapter(self, folder: Path, name: str, recipe: Recipe) -> "Endpoint":
        """Have the server load an adapter, by vLLM's way of doing so; the same server under the adapter's name."""

        async def loaded() -> Answer:
            async with _client() as client:
                body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
                until = time.monotonic() + self.deadline
                return await self._send(client, "/v1/load_lora_adapter", body, until)

        answer = asyncio.run(loaded())
        if answer.status != httpx.codes.OK:
            raise UserError(
                f"{self.url} cannot load adapters while it runs ({answer.status} {answer.told}); "
                f"serve the base with: {serve_line(recipe)}"
            )
        return replace(self, model=name)

    async def _answers(
        self, client: httpx.AsyncClient, index: int, prompt: Prompt, n: int, sampling: Sampling
    ) -> list[SampledText]:
        """All n, or none where the prompt does not fit; a server that knows nothing of `n` is asked for the others."""
        until = time.monotonic() + self.deadline
        found: list[SampledText] = []
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
            answer = await self._send(client, "/v1/chat/completions", body, until)
            if answer.status in REFUSED and "context" in answer.text.lower():
                return []
            if answer.status != httpx.codes.OK:
                raise RunFailedError(f"{answer.url}: {answer.status} {answer.told}")
            for text, ended in answer.choices()[: n - len(found)]:
                found.append(SampledText(index, len(found), text.strip(), ended))
        return found

    async def _send(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], until: float) -> Answer:
        """Post, and again with growing pauses while the server is busy or away, until the time is over."""
        pause, why = 0.5, "it did not answer to the end"
        while True:
            try:
                answer = await _asked(client, self.url + path, until - time.monotonic(), body)
                if answer.status not in BUSY:
                    return answer
                why = f"{answer.status} {answer.told}"
            except httpx.HTTPError as fault:
                why = first_line(fault)
            except TimeoutError:
                pass
            wait = pause * random.uniform(0.5, 1.5)  # many clients do not come back as one
            if time.monotonic() + wait > until:
                raise RunFailedError(f"{self.url}{path}: gave up after {self.deadline:g} s ({why})")
            await asyncio.sleep(wait)
            pause = min(2 * pause, PATIENCE)


async def _first_of(waiting: set[Task]) -> tuple[set[Task], set[Task]]:
    return await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def _client() -> httpx.AsyncClient:
    key = os.environ.get(KEY)
    return httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {key}"} if key else {})


async def _asked(client: httpx.AsyncClient, url: str, seconds: float, body: dict[str, Any] | None = None) -> Answer:
    """Get, or post a body. The time and LARGEST hold for all of the answer, however slowly it comes."""
    content = bytearray()
    async with (
        asyncio.timeout(max(seconds, 0)),
        client.stream("GET" if body is None else "POST", url, json=body) as answer,
    ):
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > LARGEST:
                raise RunFailedError(f"{url}: an answer of more than {LARGEST >> 20} MB")
        return Answer(url, answer.status_code, bytes(content))


def _reached(url: str, seconds: float) -> Answer:
    """What a server answers to a question that any of them can; an error where there is none."""

    async def reached() -> Answer:
        async with _client() as client:
            return await _asked(client, url, seconds)

    try:
        return asyncio.run(reached())
    except TimeoutError:
        raise UserError(f"{url}: no whole answer within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        raise UserError(f"no server at {url} ({first_line(fault)})") from fault


def _text(value: object) -> str:
    """Text of a server, nothing for null; half characters, which no file can hold, are replaced."""
    if value is not None and not isinstance(value, str):
        raise TypeError
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def serve_line(recipe: Recipe) -> str:
    """How to serve a recipe's base with vLLM so that adapters can be loaded while it runs."""
    base, own = recipe.base, (recipe.rsf and recipe.rsf.lora) or recipe.lora
    rank = own.rank + ((recipe.sft.lora or recipe.lora).rank if recipe.sft else 0)  # the start adapter goes with it
    rank = max(rank, (recipe.reward.lora or recipe.lora).rank if recipe.reward else 0)  # it is loaded to see if one can
    ranks = [size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank]
    model = str(local_folder(base.model) or base.model)
    words = ["vllm", "serve", model, *(["--revision", base.revision] if base.revision else [])]
    words += ["--chat-template", base.chat_template] if base.chat_template else []
    words += ["--quantization", "bitsandbytes"] if base.quantization == "nf4" else []
    words += ["--enable-lora", "--max-lora-rank", str(ranks[0] if ranks else rank)]
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join(words)

"""A sampler that uses an OpenAI-compatible server, such as vLLM or SGLang."""

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx

from lora_align.data.rows import Prompt, prompt_key
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.model.sampler_protocol import SampledText, Sampling

KEY = "OPENAI_API_KEY"
CONCURRENT = 32  # requests in flight at the same time
DEADLINE = 600.0  # seconds for one prompt's answers, retries included
LONGEST_PAUSE = 30.0  # seconds between two tries
LARGEST = 16 << 20  # bytes of one response; a hundred answers of 4,096 tokens take about 2 MB
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes that are retried
REFUSED = (400, 413, 422)  # status codes of a bad request, for example when the prompt does not fit the context

Task = asyncio.Task[list[SampledText]]


@dataclass(frozen=True)
class Response:
    """A server's whole response to one request."""

    url: str
    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    @property
    def excerpt(self) -> str:
        """Return the beginning of the response in one line, to quote in an error."""
        return " ".join(self.text[:1000].split())[:200]

    def json_object(self) -> dict[str, Any]:
        """Parse the response as a JSON object. Otherwise raise an error that names the server."""
        try:
            parsed = json.loads(self.content)
        except (ValueError, RecursionError) as fault:
            raise RunFailedError(
                f"{self.url}: the response is not JSON ({first_line(fault)}): {self.excerpt}"
            ) from fault
        if not isinstance(parsed, dict):
            raise RunFailedError(f"{self.url}: the response is not a JSON object: {self.excerpt}")
        return parsed

    def models(self) -> list[str]:
        """Return the model names in a response to /v1/models."""
        try:
            return [_text(entry["id"]) for entry in self.json_object()["data"]]
        except (KeyError, TypeError) as fault:
            raise RunFailedError(f"{self.url}: the response is not a list of models: {self.excerpt}") from fault

    def choices(self) -> list[tuple[str, bool, list[int]]]:
        """Return each answer of a chat completion, whether it reached its stop token, and its tokens if stated."""
        try:
            choices = self.json_object()["choices"]
            if not isinstance(choices, list):
                raise TypeError
            answers = [
                (
                    _text(choice["message"]["content"]),
                    choice.get("finish_reason") == "stop",
                    [int(token) for token in choice.get("token_ids") or ()],
                )
                for choice in choices
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise RunFailedError(f"{self.url}: the response is not a chat completion: {self.excerpt}") from fault
        if not answers:
            raise RunFailedError(f"{self.url}: the response has no choices: {self.excerpt}")
        return answers


@dataclass(frozen=True)
class Endpoint:
    """A sampler that uses one model of a server."""

    url: str
    model: str
    deadline: float = DEADLINE
    template: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs
    token_ids: bool = False  # ask for the sampled tokens, as vLLM states them

    @classmethod
    def at(
        cls,
        address: str,
        model: str = "",
        deadline: float = DEADLINE,
        template: Mapping[str, Any] | None = None,
        options: tuple[str, str] = ("--endpoint", "--model"),
    ) -> "Endpoint":
        """Connect to the server at `address`, with or without /v1 at its end.

        If `model` is "", use the only model of the server. Errors mention `options`, the command-line options for the
        address and the model.
        """
        url = address.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{options[0]} {address!r}: expected http://HOST:PORT or https://…")
        response = _get(f"{url}/v1/models", min(deadline, LONGEST_PAUSE))  # short, to report a missing server soon
        if not model:
            if response.status != httpx.codes.OK:
                raise UserError(
                    f"{response.url}: {response.status} {response.excerpt}; name the model with {options[1]} NAME"
                )
            served = response.models()
            if not served:
                raise UserError(f"{url} serves no model; start the server with one")
            if len(served) > 1:
                raise UserError(f"{url} serves {', '.join(served)}: choose one with {options[1]} NAME")
            model = served[0]
        return cls(url, model, deadline, template or {})

    def fits(self, prompt: Prompt) -> bool:
        """Return True: only the server knows its context length."""
        return True

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """Yield the answers prompt by prompt, as they arrive. The first failure cancels all other requests."""
        with asyncio.Runner() as runner:
            client, waiting = runner.run(self._start(prompts, n, sampling))
            try:
                while waiting:
                    done, waiting = runner.run(_first_of(waiting))
                    for task in done:
                        yield task.result()
            finally:
                for task in waiting:
                    task.cancel()
                runner.run(client.aclose())

    async def _start(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling
    ) -> tuple[httpx.AsyncClient, set[Task]]:
        client, slots = _client(), asyncio.Semaphore(CONCURRENT)

        async def answers(index: int, prompt: Prompt) -> list[SampledText]:
            async with slots:
                return await self._answers(client, index, prompt, n, sampling)

        return client, {asyncio.create_task(answers(index, prompt)) for index, prompt in enumerate(prompts)}

    def load_adapter(self, folder: Path, name: str, serve_command: str) -> "Endpoint":
        """Load an adapter on the server through vLLM's API. Return an endpoint for the model with this adapter.

        `serve_command` is the command that starts a suitable server; the error message shows it.
        """

        async def load() -> Response:
            async with _client() as client:
                body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
                until = time.monotonic() + self.deadline
                return await self._send(client, "/v1/load_lora_adapter", body, until)

        response = asyncio.run(load())
        if response.status != httpx.codes.OK:
            raise UserError(
                f"{self.url} cannot load adapters at run time ({response.status} {response.excerpt}); "
                f"serve the base with: {serve_command}"
            )
        return replace(self, model=name)

    async def _answers(
        self, client: httpx.AsyncClient, index: int, prompt: Prompt, n: int, sampling: Sampling
    ) -> list[SampledText]:
        """Return n answers, or none if the prompt does not fit. Repeat the request if the server ignores `n`."""
        until = time.monotonic() + self.deadline
        answers: list[SampledText] = []
        while len(answers) < n:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": m.role, "content": m.content} for m in prompt],
                "n": n - len(answers),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
            }
            if self.template:
                body["chat_template_kwargs"] = dict(self.template)
            if self.token_ids:
                body["return_token_ids"] = True
            if sampling.seed is not None:
                key = f"{sampling.seed} {prompt_key(prompt)} {len(answers)}"
                body["seed"] = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 2**31
            response = await self._send(client, "/v1/chat/completions", body, until)
            if response.status in REFUSED and "context" in response.text.lower():
                return []
            if response.status != httpx.codes.OK:
                raise RunFailedError(
                    f"{response.url}: the server answered {response.status} {response.excerpt}; see its log"
                )
            for text, ended, ids in response.choices()[: n - len(answers)]:
                answers.append(SampledText(index, len(answers), text.strip(), ended, ids))
        return answers

    async def _send(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], until: float) -> Response:
        """Post a request. While the server is busy or down, retry with growing pauses until the deadline."""
        pause, why = 0.5, "no complete response"
        while True:
            try:
                response = await _request(client, self.url + path, until - time.monotonic(), body)
                if response.status not in BUSY:
                    return response
                why = f"{response.status} {response.excerpt}"
            except httpx.HTTPError as fault:
                why = first_line(fault)
            except TimeoutError:
                pass
            wait = pause * random.uniform(0.5, 1.5)  # so that many clients do not retry at the same moment
            if time.monotonic() + wait > until:
                raise RunFailedError(
                    f"{self.url}{path}: gave up after {self.deadline:g} s ({why}); check the server, and run the "
                    "command again"
                )
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


async def _first_of(waiting: set[Task]) -> tuple[set[Task], set[Task]]:
    return await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def _client() -> httpx.AsyncClient:
    key = os.environ.get(KEY)
    return httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {key}"} if key else {})


async def _request(client: httpx.AsyncClient, url: str, seconds: float, body: dict[str, Any] | None = None) -> Response:
    """Send a GET request, or a POST request with a body. `seconds` and LARGEST limit the whole response."""
    content = bytearray()
    async with (
        asyncio.timeout(max(seconds, 0)),
        client.stream("GET" if body is None else "POST", url, json=body) as stream,
    ):
        async for piece in stream.aiter_bytes():
            content += piece
            if len(content) > LARGEST:
                raise RunFailedError(
                    f"{url}: the response exceeds {LARGEST >> 20} MiB; lower max_new_tokens or the number of answers"
                )
        return Response(url, stream.status_code, bytes(content))


def _get(url: str, seconds: float) -> Response:
    async def get() -> Response:
        async with _client() as client:
            return await _request(client, url, seconds)

    try:
        return asyncio.run(get())
    except TimeoutError:
        raise UserError(
            f"{url}: no complete response within {seconds:g} s; try again when the server has loaded its model"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        raise UserError(f"no server at {url} ({first_line(fault)}); start it, or correct the address") from fault


def _text(value: object) -> str:
    """Return a text of a server's response, "" for null. Replace lone surrogates, which UTF-8 cannot encode."""
    if value is not None and not isinstance(value, str):
        raise TypeError
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")

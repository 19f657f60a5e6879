"""The routes of the server: OpenAI's completions with weights per request, the vectors, and the page."""

import asyncio
import copy
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

import psutil
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from lora_align.data.rows import Message, Prompt, with_system_prompt
from lora_align.errors import RunFailedError, UserError, first_line, inert
from lora_align.model.memory_budget import is_out_of_memory
from lora_align.policy.policy import WANT
from lora_align.serve.answer import Answer, AnswerSettings, Context, Piece
from lora_align.serve.batcher import Batcher
from lora_align.serve.catalogue import Catalogue, Served, UnknownNameError
from lora_align.serve.requests import ChatBody, CompletionBody, TextBody, parse, weights_of
from lora_align.serve.responses import Completion, error_body, event
from lora_align.serve.vector_facts import facts

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
WARNING = "x-lora-align-warning"
MOST_ANSWERS = 128  # to one request
Pieces = asyncio.Queue[tuple[int, tuple[Piece, ...]]]  # of the answer with a number


@dataclass
class Api:
    """The state behind the routes."""

    catalogue: Catalogue
    batcher: Batcher
    length: int  # maximum tokens of an answer, if a request gives none
    deadline: float  # seconds for one request
    log: Callable[[str], None]
    running: dict[str, tuple[Served, list[Answer]]] = field(default_factory=dict)  # by the id of the request
    encoding: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def decoder(self) -> PreTrainedTokenizerBase:
        """Return a tokenizer for answers. A fast tokenizer fails while another thread encodes with it."""
        return copy.deepcopy(self.catalogue.base.chat.tokenizer)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [Route(path, self._file) for path in PAGE]
        routes += [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/vectors", self.vectors),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/requests/{id}/weights", self.change_weights, methods=["POST"]),
        ]
        faults = (UserError, TimeoutError, RuntimeError, MemoryError, Exception)
        handlers = {HTTPException: _http_fault, ClientDisconnect: _client_left, **dict.fromkeys(faults, _fault)}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, _: Request) -> Response:
        """Return the load of the server."""
        batcher, known = self.batcher, await run_in_threadpool(self.catalogue.known)
        memory = psutil.Process().memory_info().rss
        if batcher.model.device.type == "cuda":
            memory = torch.cuda.memory_reserved()
        return JSONResponse(
            {
                "status": "ok",
                "waiting": len(batcher.waiting),
                "running": len(batcher.rows),
                "tokens_per_second": round(batcher.tokens_per_second(), 1),
                "tokens": {"cached": batcher.cache.tokens, "stored": batcher.store.tokens, "budget": batcher.budget},
                "memory_bytes": memory,
                "vectors": list(known.vectors),
            }
        )

    async def models(self, _: Request) -> Response:
        """List the names that `model` takes."""
        names = await run_in_threadpool(self.catalogue.names)
        known = await run_in_threadpool(self.catalogue.known)
        objectives = {name: run.manifest.method["objectives"] for name, run in known.conditioned.items()}
        about = {"object": "model", "created": int(time.time()), "owned_by": "lora-align"}
        models = [
            {"id": name, **about, **({"objectives": objectives[name]} if name in objectives else {})} for name in names
        ]
        return JSONResponse({"object": "list", "data": models})

    async def vectors(self, _: Request) -> Response:
        """Return the vectors with their norms, angles and safe weights."""
        return JSONResponse(await run_in_threadpool(facts, self.catalogue))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        body: ChatBody = parse(ChatBody, await _json(request))
        served = await run_in_threadpool(self._served, body)
        roles = {"developer": "system"}
        turns = tuple(Message(roles.get(message.role, message.role), message.text) for message in body.messages)
        prompt = await run_in_threadpool(self._tokens, with_system_prompt(served.policy.system, turns))
        return await self._answer(request, body, served, [prompt])

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        body: TextBody = parse(TextBody, await _json(request))
        if body.want is not None or body.model.startswith(WANT):
            raise UserError("a direction is a system message, so it needs /v1/chat/completions")
        served = await run_in_threadpool(self._served, body)
        prompts = [await run_in_threadpool(self._tokens, one) if isinstance(one, str) else one for one in body.prompts]
        vocabulary = self.batcher.model.config.get_text_config().vocab_size
        if any(token >= vocabulary for prompt in prompts for token in prompt):
            raise UserError(f"prompt: a token is not in the vocabulary of {vocabulary:,}")
        return await self._answer(request, body, served, prompts)

    async def change_weights(self, request: Request) -> Response:
        """Change the weights of an answer that is being written, from its next token on."""
        body: CompletionBody = parse(CompletionBody, await _json(request))
        weights = weights_of(body, await run_in_threadpool(self.catalogue.ids))
        if weights is None:
            raise UserError('give weights, as in {"weights": {"helpful": 0.5}}')
        name = request.path_params["id"]
        if name not in self.running:
            raise UnknownNameError(f"no answer {name!r} is being written")
        served, answers = self.running[name]
        changed = await run_in_threadpool(self.catalogue.reweigh, served, weights)
        await asyncio.wrap_future(self.batcher.call(lambda: self.batcher.change(answers, changed.weights)))
        policy = changed.policy
        return JSONResponse({"model": policy.name, "weights": dict(policy.weights), "warnings": changed.warnings})

    async def _file(self, request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response((files("lora_align.serve") / "page" / name).read_bytes(), media_type=kind, headers=HEADERS)

    def _served(self, body: CompletionBody) -> Served:
        return self.catalogue.serve(body.model, weights_of(body, self.catalogue.ids()), body.want)

    def _tokens(self, text: str | Prompt) -> list[int]:
        """Return the tokens of a text or of a chat. Tokenizers have settings that one call changes for another."""
        chat = self.catalogue.base.chat
        with self.encoding:
            return list(chat.tokenizer(text)["input_ids"]) if isinstance(text, str) else chat.prompt_ids(text)

    async def _answer(
        self, request: Request, body: ChatBody | TextBody, served: Served, prompts: Sequence[Sequence[int]]
    ) -> Response:
        """Queue the answers to some prompts, and return them or stream them."""
        if len(prompts) * body.n > MOST_ANSWERS:
            raise UserError(f"{len(prompts) * body.n:,} answers were asked for; a request may have {MOST_ANSWERS}")
        chat, loop = isinstance(body, ChatBody), asyncio.get_running_loop()
        pieces: Pieces = asyncio.Queue()
        client = request.client.host if request.client else ""
        groups: list[list[Answer]] = []
        for place, prompt in enumerate(prompts):
            context, settings = self._context(prompt, served), self._settings(body, len(prompt))

            def made(number: int, at: int, context: Context = context, settings: AnswerSettings = settings) -> Answer:
                unsent: list[Piece] = []

                def send(piece: Piece) -> None:
                    unsent.append(piece)
                    if body.stream or piece.finish or piece.error:  # each wake-up of the loop holds up the batcher
                        with suppress(RuntimeError):  # the loop has ended
                            loop.call_soon_threadsafe(pieces.put_nowait, (at, tuple(unsent)))
                        unsent.clear()

                deadline = time.monotonic() + self.deadline
                return Answer((context,), settings, number, self.decoder, send, client, deadline)

            groups.append([made(number, place * body.n + number) for number in range(body.n)])
        completion = Completion(
            f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(16)}",
            served.policy.name,
            chat,
            self.decoder,
            [answer for group in groups for answer in group],
            served.warnings,
            body.return_token_ids,
        )
        headers = {"x-request-id": completion.id, "cache-control": "no-cache"}
        if served.warnings:
            headers[WARNING] = _header("; ".join(served.warnings))
        with ExitStack() as stack:
            stack.enter_context(self._writing(completion, served))
            for group in groups:
                self.batcher.submit(group)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return _Stream(_events(completion, pieces, usage), headers, stack.pop_all())
            return JSONResponse(completion.whole(await _gathered(request, completion, pieces)), headers=headers)

    @contextmanager
    def _writing(self, completion: Completion, served: Served) -> Iterator[None]:
        """Let a request be found by its id. At the end, or when its client leaves, end its answers."""
        answers, began = list(completion.answers), time.monotonic()
        self.running[completion.id] = served, answers
        try:
            yield
        finally:
            del self.running[completion.id]
            cancelled = any(not answer.ended for answer in answers)
            for answer in answers:
                answer.ended = True
            usage, seconds = completion.usage(), time.monotonic() - began
            self.log(
                f"{completion.model}: {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, {seconds:.1f} s"
                + (", cancelled" if cancelled else "")
            )

    def _context(self, prompt: Sequence[int], served: Served) -> Context:
        most = self.catalogue.base.max_length
        if not prompt:
            raise UserError("the prompt is empty")
        if len(prompt) >= most:
            raise UserError(f"the prompt has {len(prompt):,} tokens, and the context of the base {most:,}; shorten it")
        return Context(tuple(prompt), served.weights)

    def _settings(self, body: ChatBody | TextBody, prompt: int) -> AnswerSettings:
        return AnswerSettings(
            body.temperature,
            body.top_p,
            min(body.length or self.length, self.catalogue.base.max_length - prompt),
            body.random_seed,
            frozenset() if body.ignore_eos else self.catalogue.base.chat.stop_ids,
            body.stop_texts,
            body.logprob_count,
        )


class _Stream(StreamingResponse):
    """A stream of events that closes a context at its end, even if the client left before its beginning."""

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str], stack: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _following(completion: Completion, pieces: Pieces) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of all answers to their ends. Raise the first error."""
    left = len(completion.answers)
    while left:
        at, some = await pieces.get()
        for piece in some:
            if piece.error is not None:
                raise piece.error
            left -= bool(piece.finish)
            yield at, piece


async def _gathered(request: Request, completion: Completion, pieces: Pieces) -> list[list[Piece]]:
    """Return the pieces of each answer. Stop waiting if the client leaves."""

    async def gather() -> list[list[Piece]]:
        parts: list[list[Piece]] = [[] for _ in completion.answers]
        async for at, piece in _following(completion, pieces):
            parts[at].append(piece)
        return parts

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(gather()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(completion: Completion, pieces: Pieces, usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a streamed response."""
    opened: set[int] = set()
    try:
        async for at, piece in _following(completion, pieces):
            if completion.chat and at not in opened:
                opened.add(at)
                yield event(completion.opening(at))
            yield event(completion.chunk(at, piece))
        if usage:
            yield event(completion.closing())
        yield event("[DONE]")
    except (UserError, TimeoutError, RuntimeError, MemoryError) as fault:
        yield event(error_body(*_status(fault)))


async def _json(request: Request) -> Any:
    """Return the body of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    body = await request.body()

    def read() -> Any:
        try:
            data = json.loads(body)
            json.dumps(data, ensure_ascii=False).encode()  # refuses lone surrogates, which no tokenizer takes
        except (ValueError, RecursionError) as fault:
            raise UserError(f"the body is not JSON in UTF-8: {first_line(fault)}") from fault
        return data

    return await run_in_threadpool(read)


def _status(fault: Exception) -> tuple[int, str, str]:
    """Return the status, the message and the code of an error."""
    if isinstance(fault, UnknownNameError):
        return 404, str(fault), "model_not_found"
    if isinstance(fault, RunFailedError):
        return 503, str(fault), ""
    if isinstance(fault, UserError):
        return 400, str(fault), ""
    if isinstance(fault, TimeoutError):
        return 504, str(fault), "timeout"
    if is_out_of_memory(fault):
        return 503, "out of memory; send a shorter prompt, or lower max_tokens", "out_of_memory"
    return 500, str(fault), ""


async def _fault(_: Request, fault: Exception) -> Response:
    status, message, code = _status(fault)
    return JSONResponse(error_body(status, message, code), status)


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http_fault(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return JSONResponse(error_body(fault.status_code, fault.detail), fault.status_code, headers=fault.headers)


def _header(text: str) -> str:
    """Return text that a header may hold."""
    return inert(" ".join(text.split())).encode("ascii", "replace").decode()[:1000]

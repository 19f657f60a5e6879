"""The routes of the server: OpenAI's completions with weights per request, the vectors, and the page."""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import psutil
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_align.data.rows import Message, Prompt, with_system_prompt
from lora_align.errors import UserError, first_line, inert
from lora_align.model.chat_format import text_of
from lora_align.policy.policy import PROMPTS, WANTS
from lora_align.serve.answer import Answer, AnswerSettings, Context, Piece
from lora_align.serve.batcher import Batcher
from lora_align.serve.catalogue import Catalogue, Served, UnknownNameError
from lora_align.serve.delivery import EventStream, Pieces, events, gathered, status_of
from lora_align.serve.requests import ChatBody, CompletionBody, TextBody, parse, weights_of
from lora_align.serve.responses import Completion, error_body
from lora_align.serve.vector_facts import facts

PAGE = {
    "/": ("index.html", "text/html"),
    "/picks": ("picks.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in ("page.js", "picks.js", "parts.js", "requests.js")},
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


@dataclass
class Api:
    """The state behind the routes."""

    catalogue: Catalogue
    batcher: Batcher
    length: int  # maximum tokens of an answer, if a request gives none
    deadline: float  # seconds for one request
    log: Callable[[str], None]
    log_texts: bool = False  # log prompts and answers, too
    running: dict[str, tuple[Served, list[Answer]]] = field(default_factory=dict)  # by the id of the request

    def app(self, more: Sequence[Route] = ()) -> Starlette:
        """Return the application, with more routes."""
        routes = [*more, *(Route(path, self._file) for path in PAGE)]
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
                "content": await run_in_threadpool(self.catalogue.content),
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
        body: ChatBody = parse(ChatBody, await read_json(request))
        served = await run_in_threadpool(self._served, body)
        roles = {"developer": "system"}
        turns = tuple(Message(roles.get(message.role, message.role), message.text) for message in body.messages)
        forms = [with_system_prompt(served.policy.system, turns), *([turns] if served.policy.strength != 1 else [])]
        prompt = [await run_in_threadpool(self._tokens, form) for form in forms]
        return await self._answer(request, body, served, [prompt])

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        body: TextBody = parse(TextBody, await read_json(request))
        if body.want is not None or body.model.startswith((*WANTS, *PROMPTS)):
            raise UserError("directions and prompts are system messages, so they need /v1/chat/completions")
        served = await run_in_threadpool(self._served, body)
        prompts = [await run_in_threadpool(self._tokens, one) if isinstance(one, str) else one for one in body.prompts]
        vocabulary = self.batcher.model.config.get_text_config().vocab_size
        if any(token >= vocabulary for prompt in prompts for token in prompt):
            raise UserError(f"prompt: a token is not in the vocabulary of {vocabulary:,}")
        return await self._answer(request, body, served, [[prompt] for prompt in prompts])

    async def change_weights(self, request: Request) -> Response:
        """Change the weights of an answer that is being written, from its next token on."""
        body: CompletionBody = parse(CompletionBody, await read_json(request))
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
        """Return the tokens of a text or of a chat. Refuse a long text before its tokens are counted."""
        chat, most = self.catalogue.base.chat, self.catalogue.base.max_length
        size = len(text) if isinstance(text, str) else sum(len(turn.content) for turn in text)
        if size > most * chat.longest_token:
            raise UserError(
                f"the prompt has {size:,} characters, and the context of the base {most:,} tokens; shorten it"
            )
        with self.catalogue.encoding:
            return list(chat.tokenizer(text)["input_ids"]) if isinstance(text, str) else chat.prompt_ids(text)

    async def _answer(
        self, request: Request, body: ChatBody | TextBody, served: Served, prompts: Sequence[Sequence[Sequence[int]]]
    ) -> Response:
        """Queue the answers to some prompts, and return them or stream them. A prompt may have two forms."""
        if len(prompts) * body.n > MOST_ANSWERS:
            raise UserError(f"{len(prompts) * body.n:,} answers were asked for; a request may have {MOST_ANSWERS}")
        chat, loop = isinstance(body, ChatBody), asyncio.get_running_loop()
        pieces: Pieces = asyncio.Queue()
        client = f"{request.client.host}:{request.client.port}" if request.client else ""
        groups: list[list[Answer]] = []
        for place, prompt in enumerate(prompts):
            contexts, settings = self._contexts(prompt, served), self._settings(body, max(map(len, prompt)))
            needed = len(contexts) * (max(map(len, prompt)) + settings.max_tokens)
            if needed > self.batcher.largest:
                raise UserError(
                    f"the prompt and max_tokens need memory for {needed:,} tokens, and there is memory for "
                    f"{self.batcher.largest:,}; lower max_tokens"
                )

            def made(
                number: int, at: int, contexts: tuple[Context, ...] = contexts, settings: AnswerSettings = settings
            ) -> Answer:
                unsent: list[Piece] = []

                def send(piece: Piece) -> None:
                    unsent.append(piece)
                    if body.stream or piece.finish or piece.error:  # each wake-up of the loop holds up the batcher
                        with suppress(RuntimeError):  # the loop has ended
                            loop.call_soon_threadsafe(pieces.put_nowait, (at, tuple(unsent)))
                        unsent.clear()

                deadline = time.monotonic() + self.deadline
                return Answer(contexts, settings, number, self.catalogue.decoder, send, client, deadline)

            groups.append([made(number, place * body.n + number) for number in range(body.n)])
        completion = Completion(
            f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(16)}",
            served.policy.name,
            chat,
            self.catalogue.decoder,
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
                return EventStream(events(completion, pieces, usage), headers, stack.pop_all())
            return JSONResponse(completion.whole(await gathered(request, completion, pieces)), headers=headers)

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
            model = completion.model
            if model.startswith(PROMPTS) and not self.log_texts:
                model = model.partition(":")[0]
            self.log(
                f"{model}: {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, {seconds:.1f} s"
                + (", cancelled" if cancelled else "")
            )
            for answer in answers if self.log_texts else ():
                self.log(f"prompt: {inert(text_of(self.catalogue.decoder, answer.contexts[0].prompt))}")
                self.log(f"answer: {inert(answer.text)}")

    def _contexts(self, forms: Sequence[Sequence[int]], served: Served) -> tuple[Context, ...]:
        """Return a row of the batch for each form of a prompt: with and without a system prompt of some strength."""
        most, longest, strength = self.catalogue.base.max_length, max(map(len, forms)), served.policy.strength
        if not min(map(len, forms)):
            raise UserError("the prompt is empty")
        if longest >= most:
            raise UserError(f"the prompt has {longest:,} tokens, and the context of the base {most:,}; shorten it")
        shares = [1.0] if len(forms) == 1 else [strength, 1 - strength]
        return tuple(Context(tuple(form), served.weights, of) for form, of in zip(forms, shares, strict=True))

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


async def read_json(request: Request) -> Any:
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


async def _fault(_: Request, fault: Exception) -> Response:
    status, message, code = status_of(fault)
    return JSONResponse(error_body(status, message, code), status)


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http_fault(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return JSONResponse(error_body(fault.status_code, fault.detail), fault.status_code, headers=fault.headers)


def _header(text: str) -> str:
    """Return text that a header may hold."""
    return inert(" ".join(text.split())).encode("ascii", "replace").decode()[:1000]

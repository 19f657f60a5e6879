"""Bring the pieces of answers from the batcher to a client: as one response, or as a stream of events."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lora_align.errors import RunFailedError, UserError
from lora_align.model.memory_budget import is_out_of_memory
from lora_align.serve.answer import Piece
from lora_align.serve.catalogue import UnknownNameError
from lora_align.serve.responses import Completion, error_body, event

Pieces = asyncio.Queue[tuple[int, tuple[Piece, ...]]]  # of the answer with a number


class EventStream(StreamingResponse):
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


async def gathered(request: Request, completion: Completion, pieces: Pieces) -> list[list[Piece]]:
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


async def events(completion: Completion, pieces: Pieces, usage: bool) -> AsyncIterator[bytes]:
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
        yield event(error_body(*status_of(fault)))


def status_of(fault: Exception) -> tuple[int, str, str]:
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

"""Start the server: load the base, bind the port, and answer until a signal arrives."""

import asyncio
import errno
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.policy.loading import warn_of
from lora_align.policy.policy import Policy
from lora_align.recipe import Recipe
from lora_align.serve.api import PAGE, Api
from lora_align.serve.batcher import Batcher
from lora_align.serve.catalogue import Catalogue
from lora_align.serve.engine import STOP_SECONDS, Engine
from lora_align.serve.guard import Guard

HEADER_SECONDS = 10.0  # for the headers of a request
READ_SECONDS = 30.0  # in which a client must read some of its response
CONNECTIONS = 1000
SWITCH_SECONDS = 0.0005  # until a thread gives way to another; the batcher must not wait for the API


@dataclass(frozen=True)
class ServerSettings:
    """The options of `serve`."""

    host: str
    port: int
    key: str | None
    without_auth: bool
    length: int
    deadline: float
    log_texts: bool = False

    @property
    def local(self) -> bool:
        """Return whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Refuse a server that everybody could use by accident."""
        if not self.local and not self.key and not self.without_auth:
            raise UserError(
                f"--host {self.host}: other machines could use this server; set --api-key KEY, or allow it with "
                "--no-auth"
            )


class _Protocol(H11Protocol):
    """Closes connections of clients that do not send a whole request, or do not read their response, in time."""

    sending: asyncio.TimerHandle | None = None  # runs while a request arrives
    reading: asyncio.TimerHandle | None = None  # runs while the client does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self.sending, self.reading)):
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.reading:
            self.reading.cancel()

    def _watch(self) -> None:
        """Start the timer when a request begins to arrive, and cancel it when its headers are complete."""
        arrived = self.cycle is not None and not self.cycle.response_complete
        if self.sending and arrived:
            self.sending.cancel()
            self.sending = None
        elif not self.sending and not arrived:
            self.sending = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


class _Server(uvicorn.Server):
    """Lets answers run for some seconds after a signal, then ends them with an error. Ends if the batcher has ended."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, stopped: threading.Event) -> None:
        super().__init__(config)
        self._batcher, self._stopped = batcher, stopped

    async def on_tick(self, counter: int) -> bool:
        return self._stopped.is_set() or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(STOP_SECONDS, self._batcher.stop)
        await super().shutdown(sockets)


def run_server(
    recipe: Recipe,
    runs_dir: Path,
    policy: Policy,
    settings: ServerSettings,
    screen: Screen,
    more: Callable[[Catalogue], Sequence[Route]] = lambda catalogue: [],
) -> None:
    """Serve until Ctrl-C. `more` makes further routes."""
    bound = _bind(settings)
    base = bases.find(recipe.base)
    warn_of(policy, base, runs_dir, screen)
    engine = Engine.start(base)
    batcher = engine.batcher
    catalogue = Catalogue(base, recipe, runs_dir, policy, batcher, screen.warn)
    catalogue.serve("", None, None)  # loads the default's vectors before the first request
    api = Api(catalogue, batcher, settings.length, settings.deadline, screen.note, settings.log_texts)
    config = uvicorn.Config(
        Guard(api.app(more(catalogue)), settings.key, [settings.host, socket.gethostname()], PAGE),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_SECONDS + 1,
    )
    server = _Server(config, batcher, engine.stopped)
    sys.setswitchinterval(SWITCH_SECONDS)
    address = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{bound.getsockname()[1]}"
    screen.result(
        f"{address} answers as {catalogue.default.name}. Open it in a browser, or use {address}/v1 as an OpenAI API. "
        "Ctrl-C stops it.",
        {"url": address, "model": catalogue.default.name},
    )
    try:
        server.run(sockets=[bound])
    finally:
        engine.stop()
    if engine.failure:
        raise RunFailedError(f"the server failed: {engine.failure[0]}") from engine.failure[0]


def _bind(settings: ServerSettings) -> socket.socket:
    """Return a socket that is bound to the address."""
    settings.check()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio disables Nagle's algorithm, which delays answers, only if the protocol is named
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
        bound.listen()
    except OSError as fault:
        bound.close()
        if fault.errno == errno.EADDRINUSE:
            raise UserError(f"port {settings.port} is in use; choose another with --port") from fault
        raise UserError(
            f"--host {settings.host}: {fault.strerror or fault}; choose an address of this machine"
        ) from fault
    return bound

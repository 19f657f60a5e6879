"""The guard refuses forged requests before they reach the application, and bounds slow and large ones."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lora_align.serve import guard
from lora_align.serve.guard import LARGEST, Guard


async def _echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


APP = Starlette(routes=[Route("/", _echo), Route("/v1/models", _echo, methods=["GET", "POST"])])


def _ask(key: str | None = None, method: str = "GET", path: str = "/v1/models", **how: Any) -> httpx.Response:
    """Send one request to the guarded application."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(APP, key, ["box"], ["/", "/page.js"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, **how)

    return asyncio.run(ask())


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "box:8000"])
def test_known_hosts_are_answered(host: str) -> None:
    assert _ask(headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[::"])
def test_other_hosts_are_refused(host: str) -> None:
    """A page may let its own domain name resolve to 127.0.0.1."""
    refused = _ask(headers={"host": host})
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_with_a_key_every_host_is_answered() -> None:
    headers = {"host": "evil.example", "authorization": "Bearer secret"}
    assert _ask("secret", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_from_other_pages_are_refused(headers: dict[str, str]) -> None:
    assert _ask(method="POST", headers=headers).status_code == 403
    assert _ask("secret", "POST", headers={**headers, "authorization": "Bearer secret"}).status_code == 403


def test_requests_from_the_own_page_are_answered() -> None:
    headers = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert _ask(method="POST", headers=headers).status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer secret2", "Bearer ", "secre", "Basic secret"])
def test_a_wrong_key_is_refused(given: str | None) -> None:
    refused = _ask("secret", headers={"authorization": given} if given else {})
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_the_page_itself_needs_no_key() -> None:
    assert _ask("secret", path="/").status_code == 200


def test_large_bodies_are_refused_with_and_without_a_length() -> None:
    assert _ask(method="POST", content=b"x" * (LARGEST + 1)).status_code == 413

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(LARGEST // 1000 + 2):
            yield b"x" * 1000

    assert _ask(method="POST", content=pieces()).status_code == 413
    assert _ask(method="POST", content=b"x" * 1000).text == "1000"
    assert _ask(method="POST", headers={"content-length": "many"}).status_code == 413


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_body_that_does_not_arrive_is_refused() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(10)

    assert _ask(method="POST", content=pieces()).status_code == 408

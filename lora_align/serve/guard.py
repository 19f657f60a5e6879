"""A guard in front of the API: the API key, the Host and Origin headers, and limits on bodies and slow clients."""

import asyncio
import hmac
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_align.serve.responses import error_body

LARGEST = 4 << 20  # bytes of a request's body
BODY_SECONDS = 20.0  # for the whole body of a request
CLOSE = {"connection": "close"}


class Guard:
    """Refuses requests before they reach the application.

    Without an API key, only requests to an address or a known host name are answered, because a web page could point
    its own domain name at this server (DNS rebinding). Requests that a page of another origin sends are refused.
    `public` are the paths of the page, which contain nothing secret and need no key.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Sequence[str], public: Collection[str]) -> None:
        self.app, self.key, self.public = app, key, public
        self.hosts = {"localhost", *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refused := self._refused(scope["method"], scope["path"], headers):
            status, message = refused
            extra = {**CLOSE, **({"www-authenticate": "Bearer"} if status == 401 else {})}
            await JSONResponse(error_body(status, message), status, headers=extra)(scope, receive, send)
            return
        await self.app(scope, _Body(receive).receive, send)

    def _refused(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.key is None and not self._is_known(host):
            return 403, f"this server does not answer for the host {host!r}; start it with --host or --api-key"
        followed_link = method == "GET" and path in self.public
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed_link
        if elsewhere or (origin is not None and origin.partition("://")[2] != host):
            return 403, "requests from pages of another origin are refused"
        if self.key is not None and path not in self.public:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):  # headers are read as Latin-1
                return 401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST:
            return 413, f"the body exceeds {LARGEST >> 20} MiB"
        return None

    def _is_known(self, host: str) -> bool:
        """Return whether a Host header has an address or a known name, with or without a port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            return bool(ip_address(name))
        except ValueError:
            return name in self.hosts


class _Body:
    """Limits the size of a request's body, and the time that it takes to arrive."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size, self._whole = receive, 0, False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} s", CLOSE) from None
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > LARGEST:
            raise HTTPException(413, f"the body exceeds {LARGEST >> 20} MiB", CLOSE)
        return message

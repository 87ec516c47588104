"""A request and the way to answer it, independent of the connection. Knows no sockets and no dispatch.

`FastExchange` answers on the router's own connections, `WebExchange` (here) on aiohttp's; handlers see only
the `Exchange` protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

from aiohttp import HttpVersion11, web

from memserve.core.errors import BadRequest
from memserve.router.errors import ClientLeft
from memserve.router.http.ingress import Ingress

JSON = "application/json"
EVENT_END = b"\n\n"
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class Exchange(Protocol):
    """One request. Answered by one `answer`, or by `write`s and an `end`."""

    path: str
    headers: Mapping[str, str]
    """Names in lower case, or a mapping that ignores case. Surrogates in values: bytes that are not UTF-8."""
    reply: dict[str, str]
    """Headers of the answer, with such surrogates, too; may be changed until it begins."""
    begun_s: float | None
    """When the first part of a stream was sent; monotonic clock."""
    num_events: int
    """Number of events of a stream that were sent."""

    @property
    def has_begun(self) -> bool:
        """True if the client may have received a part of the answer."""

    async def body(self) -> bytes:
        """The request's body. Raises BadRequest (413: too large), Overloaded (no room in the byte budget)."""

    def answer(self, body: bytes, status: int = 200) -> None:
        """Send the whole answer, which is JSON."""

    async def write(self, chunk: bytes) -> None:
        """Send a part of a stream now; the first part sends status 200. Raises ClientLeft."""

    async def end(self) -> None:
        """Complete the stream."""


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A whole answer whose body is encoded JSON."""
    return web.Response(body=body, status=status, headers=headers, content_type=JSON)


class Bodies:
    """Reads bodies from aiohttp within the limits. Event loop thread only."""

    def __init__(self, ingress: Ingress) -> None:
        self.limits = ingress.limits
        self._budget = ingress.budget
        self._out_of_memory = ingress.out_of_memory

    async def read(self, request: web.Request) -> bytes:
        """The body of a request, whose bytes are taken from the budget until `give`.

        Raises BadRequest (413 if it is too large, 408 if it does not arrive in time), Overloaded.
        """
        max_bytes, body = self.limits.max_body_bytes, bytearray()
        too_large = BadRequest(f"the body is larger than {max_bytes} bytes", status=413)
        if (request.content_length or 0) > max_bytes:
            raise too_large
        try:
            while chunk := await self._next(request):
                if len(body) + len(chunk) > max_bytes:
                    raise too_large
                if not self._budget.try_take(len(chunk)):
                    raise self._out_of_memory()
                body += chunk
        except BaseException:
            self._budget.give(len(body))
            raise
        return bytes(body)

    def give(self, body: bytes) -> None:
        """Return the bytes of a body to the budget."""
        self._budget.give(len(body))

    async def _next(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self.limits.stall_s):
                return await request.content.readany()
        except TimeoutError as error:
            raise BadRequest("the body did not arrive in time", status=408) from error
        except web.RequestPayloadError as error:
            raise BadRequest("the body is broken") from error


class WebExchange:
    """See `Exchange`. The creator calls `close`."""

    def __init__(self, request: web.Request, bodies: Bodies) -> None:
        self.path = request.path
        self.headers: Mapping[str, str] = request.headers
        self.reply: dict[str, str] = {}
        self.response: web.StreamResponse | None = None
        self.begun_s: float | None = None
        self.num_events = 0
        self._request = request
        self._bodies = bodies
        self._body = b""

    async def body(self) -> bytes:
        self._body = await self._bodies.read(self._request)
        return self._body

    def close(self) -> None:
        """Return the body's bytes to the budget."""
        self._bodies.give(self._body)

    @property
    def has_begun(self) -> bool:
        return self.response is not None

    def answer(self, body: bytes, status: int = 200) -> None:
        self.response = web.Response(body=body, status=status, headers=self.reply, content_type=JSON)

    async def write(self, chunk: bytes) -> None:
        try:
            if self.response is None:
                self.response = web.StreamResponse(headers={**self.reply, **EVENT_STREAM})
                if self._request.version < HttpVersion11:
                    self.response.force_close()  # only its end tells where the stream ends
                await self.response.prepare(self._request)
                self.begun_s = time.monotonic()
            self.num_events += chunk.count(EVENT_END)
            async with asyncio.timeout(self._bodies.limits.stall_s):
                await self.response.write(chunk)
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientLeft("the client stopped reading") from error
        except ConnectionError as error:
            raise ClientLeft("the client left") from error

    async def end(self) -> None:
        if self.response is None:
            await self.write(b"")

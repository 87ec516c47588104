"""A request and the way to answer it, however it came. Knows no sockets and no dispatch.

`front.LeanExchange` is that of the lean connections, `WebExchange` here that of aiohttp's: whoever
answers does not see which it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from aiohttp import web

from memserve.core.errors import BadRequest
from memserve.router.serving.api import Api
from memserve.router.serving.failures import ClientLeft

JSON = "application/json"
EVENT_END = b"\n\n"
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class Exchange(Protocol):
    """One request for generation. Answered by one `answer`, or by `write`s and an `end`."""

    api: Api
    headers: Mapping[str, str]
    """Names in lower case, or a mapping that does not care."""
    reply: dict[str, str]
    """Headers of the answer; may change until it begins."""
    begun_s: float | None
    """When the first part of a stream was sent, by the monotonic clock."""
    num_events: int
    """How many events of a stream were sent."""

    @property
    def has_begun(self) -> bool:
        """Whether the client may have seen anything."""

    async def body(self) -> bytes:
        """The request's body. Raises BadRequest (413) if it is too large."""

    def answer(self, body: bytes, status: int = 200) -> None:
        """The whole answer, which is JSON."""

    async def write(self, chunk: bytes) -> None:
        """Send a part of a stream now; the first one commits the status 200. Raises ClientLeft."""

    async def end(self) -> None:
        """The stream is complete."""


class WebExchange:
    """See `Exchange`."""

    def __init__(self, request: web.Request, max_body_bytes: int) -> None:
        self.api = Api(request.path)
        self.headers: Mapping[str, str] = request.headers
        self.reply: dict[str, str] = {}
        self.response: web.StreamResponse | None = None
        self.begun_s: float | None = None
        self.num_events = 0
        self._request = request
        self._max_body_bytes = max_body_bytes

    @property
    def has_begun(self) -> bool:
        return self.response is not None

    async def body(self) -> bytes:
        return await self.read(self._request, self._max_body_bytes)

    @staticmethod
    async def read(request: web.Request, max_bytes: int) -> bytes:
        """The body of any request. Raises BadRequest (413)."""
        too_large = BadRequest(f"the body is larger than {max_bytes} bytes", status=413)
        if (request.content_length or 0) > max_bytes:
            raise too_large
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large from error

    def answer(self, body: bytes, status: int = 200) -> None:
        self.response = web.Response(body=body, status=status, headers=self.reply, content_type=JSON)

    async def write(self, chunk: bytes) -> None:
        try:
            if self.response is None:
                self.response = web.StreamResponse(headers={**self.reply, **EVENT_STREAM})
                await self.response.prepare(self._request)
                self.begun_s = time.monotonic()
            self.num_events += chunk.count(EVENT_END)
            await self.response.write(chunk)
        except ConnectionError as error:
            raise ClientLeft("the client left") from error

    async def end(self) -> None:
        if self.response is None:
            await self.write(b"")

"""A request on one of the router's own connections: one write per whole answer or part of a stream.

Knows no sockets: a `ClientConnection` sends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from memserve.router.errors import ClientLeft
from memserve.router.http.exchange import EVENT_END, EVENT_STREAM, JSON

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class ClientConnection(Protocol):
    """The connection to a client."""

    is_lost: bool
    is_full: bool
    """The client reads too slowly: wait until the connection is `drained`."""

    @property
    def date(self) -> str:
        """The current time, in HTTP's format."""

    def send(self, data: bytes) -> None:
        """Write, unless the connection is lost."""

    async def drained(self) -> None:
        """Wait until the client has read enough. Raises ClientLeft."""


class FastExchange:
    """See `Exchange`. Made by its connection."""

    __slots__ = (
        *("_body", "_connection", "begun_s", "has_begun", "headers", "is_complete", "num_events"),
        *("path", "reply"),
    )

    def __init__(
        self, connection: ClientConnection, path: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        self.path = path
        self.headers = headers
        self.reply: dict[str, str] = {}
        self.has_begun = False
        self.is_complete = False
        self.begun_s: float | None = None
        self.num_events = 0
        self._connection = connection
        self._body = body

    async def body(self) -> bytes:
        return self._body

    def answer(self, body: bytes, status: int = 200) -> None:
        self.has_begun = self.is_complete = True
        head = self._head(status, f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n")
        self._connection.send(head + body)

    async def write(self, chunk: bytes) -> None:
        connection = self._connection
        if connection.is_lost:
            raise ClientLeft("the client left")
        data = b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunk else b""
        self.num_events += chunk.count(EVENT_END)
        if not self.has_begun:
            self.has_begun = True
            self.begun_s = time.monotonic()
            fields = "".join(f"{name}: {value}\r\n" for name, value in EVENT_STREAM.items())
            data = self._head(200, fields + "Transfer-Encoding: chunked\r\n") + data
        connection.send(data)
        if connection.is_full:
            await connection.drained()

    async def end(self) -> None:
        if not self.has_begun:
            await self.write(b"")
        self.is_complete = True
        self._connection.send(b"0\r\n\r\n")

    def _head(self, status: int, fields: str) -> bytes:
        reply = "".join([f"{name}: {value}\r\n" for name, value in self.reply.items()])
        date = self._connection.date
        line = f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n"
        return f"{line}{fields}{reply}Date: {date}\r\n\r\n".encode(errors="surrogateescape")

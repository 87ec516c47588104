"""Keep-alive HTTP connections to instances, for generation requests only.

One request at a time on each; the answer's bytes are delivered as they come. A request whose kept connection
turns out to be closed is sent again on a new one. Knows no requests, roles or other retries: it raises what
the network raises.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast
from urllib.parse import urlsplit
from weakref import WeakSet

import httptools

from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.errors import MalformedResponse
from memserve.router.proxy.config import ProxyConfig

T = TypeVar("T")

MAX_UNREAD_BYTES = 256 << 10
"""Unread bytes at which reading from the instance is paused for a slow client."""
_MARGIN_S = 1.0
"""How long before the end that `Keep-Alive: timeout` announces a connection is used no more."""
_TIMEOUT = re.compile(rb"\btimeout\s*=\s*(\d{1,9})")


class UpstreamUnresponsive(MalformedResponse):
    """The instance does not answer, though the connection is open."""


class Connection(asyncio.Protocol):
    """One connection. Its callbacks are called by httptools and the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_free: Callable[[Connection], None]) -> None:
        self.idle_since_s = 0.0
        self.keep_s = math.inf
        """How long the instance keeps it open when idle, as far as it said so."""
        self.was_stale = False
        """The instance closed it, which had served before, and answered the last request with not a byte."""
        self.is_closed = False
        self.status = 0
        """The answer's status; 0 until it begins."""
        self._loop = loop
        self._on_free = on_free
        self._is_busy = False
        self._is_complete = False
        self._ends_with_connection = True
        self._can_be_kept = False
        self._was_used = False
        self._has_answer_bytes = False
        self._error: ConnectionError | None = None
        self._chunks: list[bytes] = []
        self._num_unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._wants_all = False

    def send(self, request: bytes) -> None:
        """Begin a request. The connection must be new or free."""
        self.status, self._is_busy, self._is_complete, self._wants_all = 0, True, False, False
        self._ends_with_connection = True
        self._can_be_kept = self._has_answer_bytes = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    async def answered(self) -> int:
        """Wait for the answer's head; its status. Raises ConnectionError."""
        while not self.status:
            await self._wait()
        return self.status

    async def next(self) -> bytes:
        """The bytes since the last call, as soon as there are any; b"" at the end. Raises ConnectionError."""
        while not self._chunks:
            if self._is_complete:
                return b""
            await self._wait()
        self._go_on()
        return self._taken()

    async def read(self) -> bytes:
        """All remaining bytes. Raises ConnectionError."""
        self._wants_all = True
        self._go_on()
        while not self._is_complete:
            await self._wait()
        return self._taken()

    def release(self) -> None:
        """The reader is done: free the connection if the answer was complete, else close it."""
        if self.is_closed:
            return
        if self._is_complete and not self._chunks and self._can_be_kept:
            self._is_busy, self._was_used = False, True
            self.idle_since_s = self._loop.time()
            self._on_free(self)
        else:
            self.close()

    def abandon(self, error: ConnectionError) -> None:
        """Close the connection; its reader gets `error`."""
        if not self.is_closed:
            self._transport.abort()
            self._fail(error)

    def is_closing(self) -> bool:
        """Whether it is closed, or the instance has begun to close it."""
        return self.is_closed or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection at once."""
        self.is_closed = True
        self._transport.abort()

    def _go_on(self) -> None:
        """Resume reading if it was paused."""
        if self._num_unread > MAX_UNREAD_BYTES and not self.is_closed:
            self._transport.resume_reading()

    def _taken(self) -> bytes:
        """All unread bytes."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._num_unread = 0
        return data

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self._is_complete:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: ConnectionError) -> None:
        self.is_closed = True
        self._error = error
        self._wake()

    # ---- the loop's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_busy:  # bytes without a request
            self.close()
            return
        self._has_answer_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._transport.abort()
            self._fail(MalformedResponse(f"its answer is not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if not self._is_busy or self._is_complete or self._error is not None:
            return
        if self.status and self._ends_with_connection and error is None:
            self._is_complete = True
            self._wake()
        else:
            self.was_stale = self._was_used and not self._has_answer_bytes
            self._fail(MalformedResponse("the connection broke"))

    # ---- the parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) in (14, 17) and name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        elif len(name) == 10 and name.lower() == b"keep-alive" and (told := _TIMEOUT.search(value)):
            self.keep_s = max(0.0, int(told[1]) - _MARGIN_S)

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status >= 200:
            self.status = status
            if not self._wants_all:
                self._wake()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        if not self._wants_all:
            self._num_unread += len(body)
            if self._num_unread > MAX_UNREAD_BYTES:
                self._transport.pause_reading()
            self._wake()

    def on_message_complete(self) -> None:
        if self.status:
            self._is_complete = True
            self._can_be_kept = self._parser.should_keep_alive()
            self._wake()


class ConnectionPool:
    """The connections to all instances. Event loop thread only."""

    def __init__(self, tls: ssl.SSLContext, config: ProxyConfig) -> None:
        """`tls` verifies https instances."""
        self._connect_timeout_s = config.connect_timeout_secs
        self._keepalive_s = config.upstream_keepalive_secs
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._free: dict[str, deque[Connection]] = {}
        self._open: dict[str, WeakSet[Connection]] = {}

    def free(self, url: str) -> Connection | None:
        """An idle connection to the instance at `url`; None if there is none."""
        free = self._free.get(url)
        while free:
            connection = free.pop()
            if not connection.is_closing():
                idle_s = self._loop.time() - connection.idle_since_s
                if idle_s < self._keepalive_s and idle_s < connection.keep_s:
                    return connection
                connection.close()
        return None

    async def connect(self, url: str) -> Connection:
        """A new connection. Raises OSError; TimeoutError after --connect-timeout-secs."""
        parts = urlsplit(url)
        tls = self._tls if parts.scheme == "https" else None
        free = self._free.setdefault(url, deque())
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await self._loop.create_connection(
                lambda: Connection(self._loop, free.append),
                parts.hostname or "",
                parts.port or (443 if tls else 80),
                ssl=tls,
            )
        self._open.setdefault(url, WeakSet()).add(connection)
        return connection

    def abandon(self, url: str, reason: str) -> None:
        """Close all connections to the instance at `url`, which does not answer."""
        self._abandon(url, UpstreamUnresponsive(reason))

    def crashed(self, url: str, reason: str) -> None:
        """Close all connections to the instance at `url`, which will not answer any more."""
        self._abandon(url, MalformedResponse(reason))

    def _abandon(self, url: str, error: ConnectionError) -> None:
        for connection in list(self._open.pop(url, ())):
            connection.abandon(error)

    def retain(self, up: ClusterSnapshot) -> None:
        """Close connections that have been idle for long, and forget instances that are not in `up`."""
        urls = {instance.url for instance in up.all()}
        old_s = self._loop.time() - self._keepalive_s
        for url, free in list(self._free.items()):
            while free and (free[0].is_closed or free[0].idle_since_s < old_s):
                if not (connection := free.popleft()).is_closed:
                    connection.close()
            if not free and url not in urls:
                del self._free[url]
        for url in [url for url, opened in self._open.items() if not opened]:
            del self._open[url]

    def close(self) -> None:
        """Close all idle connections."""
        for free in self._free.values():
            for connection in free:
                if not connection.is_closed:
                    connection.close()
        self._free.clear()


class UpstreamExchange:
    """One request to the instance at a URL, and its answer. RFC 9112, 9.3.1 and 9.5."""

    def __init__(self, pool: ConnectionPool, url: str) -> None:
        self.connection: Connection | None = None
        """Where the request was sent last, and the answer is read."""
        self.sent_s = math.inf
        """When the request was sent last, by time.monotonic."""
        self._pool = pool
        self._url = url

    @property
    def was_sent(self) -> bool:
        """Whether the instance may have received a part of the request."""
        return self.sent_s < math.inf

    async def begin(self, request: bytes, receive: Callable[[Connection], Awaitable[T]]) -> T:
        """Send `request`; what `receive` makes of the answer. Call once.

        An instance may close a kept connection at any time: if one breaks before the answer's first byte, the
        request is sent again, on a new connection. Raises as `ConnectionPool.connect` and `receive`.
        """
        kept = self._pool.free(self._url)
        if kept is not None:
            try:
                return await receive(self._sent(kept, request))
            except ConnectionError:
                if not kept.was_stale:
                    raise
        self.connection = None
        return await receive(self._sent(await self._pool.connect(self._url), request))

    def leave(self, *, is_answered: bool) -> None:
        """The reader is done: free or close the connection."""
        if self.connection is not None:
            self.connection.release() if is_answered else self.connection.close()

    def _sent(self, connection: Connection, request: bytes) -> Connection:
        self.connection, self.sent_s = connection, time.monotonic()
        connection.send(request)
        return connection


async def read_whole(connection: Connection) -> tuple[int, bytes]:
    """The status and the body of an answer. Raises ConnectionError."""
    answer = await connection.read()
    return connection.status, answer

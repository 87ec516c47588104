"""The router's HTTP port: own connections for plain generation requests, aiohttp's for all other requests.

    bytes ── plain POST to an `Api`, its length known ──> FastExchange ── handler
      └───── anything else ──> aiohttp takes the connection, from these bytes on

A plain request costs a parsed head, a task and one write. aiohttp reads or refuses all others (chunked
or compressed bodies, `Expect`, repeated headers, odd bytes); the same handler answers them, through
`WebExchange`. Knows no dispatch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sized
from email.utils import formatdate
from typing import Any, Protocol, cast

from memserve.core.errors import BadRequest, ConfigError
from memserve.router.errors import ClientLeft, Overloaded, failure, failure_of
from memserve.router.http.cors import Cors
from memserve.router.http.exchange import Exchange
from memserve.router.http.fast_exchange import FastExchange
from memserve.router.http.ingress import Ingress
from memserve.router.http.plain_head import plain_head
from memserve.router.http.web_connection import LINGER_S
from memserve.router.request import Api

logger = logging.getLogger(__name__)

MAX_PIPELINED_BYTES = 64 << 10
"""Bytes that a client may send ahead while its last request is answered."""
SWEEP_S = 1.0

Handler = Callable[[Exchange], Coroutine[Any, Any, None]]


class WebConnectionFactory(Protocol):
    """Makes aiohttp connections, as `web.Server` does."""

    @property
    def connections(self) -> Sized:
        """The open ones."""

    def __call__(self) -> asyncio.Protocol:
        """A new connection."""


class _Connection(asyncio.Protocol):
    """The connection of one client, until aiohttp takes it over."""

    __slots__ = (
        *("_body", "_can_write", "_head", "_held", "_is_refused", "_pending", "_task", "_transport"),
        *("_wanted", "deadline_s", "server", "is_full", "is_lost"),
    )

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.is_full = False
        self.is_lost = False
        self.deadline_s: float | None = None
        """When the connection expires unless the client acts; None while the router works."""
        self._pending = b""
        """Received and not parsed: a part of a head, or requests sent ahead."""
        self._head: tuple[Api, dict[str, str]] | None = None
        self._body = bytearray()
        self._wanted = 0
        """Length of the body that is being received."""
        self._task: asyncio.Task[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._is_refused = False
        self._held = 0
        """Bytes taken from the budget for this connection."""

    # ---- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        is_full = self.server.num_connections() >= self.server.limits.max_connections
        self.server.connections.add(self)
        self.deadline_s = self.server.now_s() + self.server.limits.head_s
        if is_full:
            self._refuse(self.server.ingress.admission.refused("connections"))
            self._transport.close()  # do not linger: there are too many

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if not self.server.budget.try_take(len(data)):
            self._refuse(self.server.ingress.out_of_memory())
            return
        self._held += len(data)
        if self._head is not None:
            self._body += data
            self._receive_body()
        elif self._task is not None:
            self._pending += data
            if len(self._pending) > MAX_PIPELINED_BYTES:
                self._transport.pause_reading()
        else:
            self._pending = self._pending + data if self._pending else data
            self._receive_head()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self.server.connections.discard(self)
        self._give()
        if self._task is not None:
            self._task.cancel()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)

    # ---- called by the exchange

    @property
    def date(self) -> str:
        """Now, as HTTP writes it."""
        return self.server.date

    def send(self, data: bytes) -> None:
        """Write, unless the connection is lost."""
        if not self.is_lost:
            self._transport.write(data)

    async def drained(self) -> None:
        """Until the client has read enough. Raises ClientLeft."""
        self._can_write = self.server.loop.create_future()
        self.deadline_s = self.server.now_s() + self.server.limits.stall_s
        await self._can_write
        self.deadline_s = None
        if self.is_lost:
            raise ClientLeft("the client left")

    # ---- called by the server

    def expire(self) -> None:
        """The deadline has passed: the client sent nothing, or read nothing."""
        if self._task is not None or self._is_refused or self._transport.get_write_buffer_size():
            self._transport.abort()
        elif self._pending or self._head is not None:
            self._refuse(BadRequest("the request did not arrive in time", status=408))
        else:
            self.close()

    def close(self) -> None:
        """Close the connection, unless a request is being answered on it."""
        if self._task is None:
            self._transport.close()

    # ---- receiving

    def _receive_head(self) -> None:
        data = self._pending
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > self.server.limits.max_header_bytes or not data[:1].isalpha() or b"\n\n" in data:
                self._hand_over()
            elif self.deadline_s is not None:
                self.deadline_s = min(self.deadline_s, self.server.now_s() + self.server.limits.head_s)
            return
        read = plain_head(data[: end + 2], self.server.limits.max_header_bytes)
        if read is None or read[2] > self.server.limits.max_body_bytes:
            self._hand_over()
            return
        if end + 4 + read[2] > len(data):
            try:
                self.server.ingress.access.authenticate(read[1].get("authorization"))
            except BadRequest as error:
                self._refuse(error)
                return
        api, headers, self._wanted = read
        self._head = api, headers
        self._body += memoryview(data)[end + 4 :]
        self._pending = b""
        self._receive_body()

    def _receive_body(self) -> None:
        if len(self._body) < self._wanted:
            self.deadline_s = self.server.now_s() + self.server.limits.stall_s
            return
        assert self._head is not None
        api, headers = self._head
        view = memoryview(self._body)
        body, self._pending = bytes(view[: self._wanted]), bytes(view[self._wanted :])
        self._head, self._body = None, bytearray()
        self.deadline_s = None
        exchange = FastExchange(self, api, headers, body)
        self._task = self.server.loop.create_task(self._serve(exchange))

    def _hand_over(self) -> None:
        """Give the connection to aiohttp, with the bytes received."""
        self.server.connections.discard(self)
        self._give()
        web = self.server.make_web()
        self._transport.set_protocol(web)
        web.connection_made(self._transport)
        web.data_received(self._pending)

    # ---- answering

    async def _serve(self, exchange: FastExchange) -> None:
        try:
            await self.server.handler(exchange)
        except Exception:
            logger.exception("a request failed inside the router path=%s", exchange.path)
            if not exchange.has_begun:
                exchange.answer(failure(500, "the router failed; see its log").body(), 500)
        finally:
            self._task = None
            if not self.is_lost:
                self._give(len(self._pending))
            if not exchange.is_complete or self.server.is_closing:
                self.deadline_s = self.server.now_s() + self.server.limits.stall_s
                self._transport.close()
            elif not self.is_lost:
                self._await_next()

    def _await_next(self) -> None:
        self.deadline_s = self.server.now_s() + self.server.limits.keepalive_s
        if self._pending:
            self._transport.resume_reading()
            self.server.loop.call_soon(self.data_received, b"")

    def _give(self, left: int = 0) -> None:
        """Return all but `left` bytes to the budget."""
        self.server.budget.give(self._held - left)
        self._held = left

    def _refuse(self, error: BadRequest | Overloaded) -> None:
        """Answer with the error, unless a request is being answered, and end the connection.

        Bytes that arrive meanwhile are read and dropped: a reset could discard the answer.
        """
        if self._task is not None:
            self._transport.abort()
            return
        failed = failure_of(error)
        exchange = FastExchange(self, Api.GENERATE, {}, b"")
        seen = (
            self._pending
            if self._head is None
            else b"\r\norigin: " + self._head[1].get("origin", "").encode()
        )
        exchange.reply = {"Connection": "close", **failed.headers(), **self.server.cors.reply_to(seen)}
        exchange.answer(failed.body(), failed.status)
        self._head, self._body, self._pending = None, bytearray(), b""
        self._give()
        self._is_refused = True
        self.deadline_s = self.server.now_s() + LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()


class HttpServer:
    """The listening socket and its connections. Event loop thread only."""

    def __init__(
        self, handler: Handler, make_web: WebConnectionFactory, ingress: Ingress, cors: Cors
    ) -> None:
        self.handler = handler
        self.make_web = make_web
        self.ingress = ingress
        self.cors = cors
        self.limits = ingress.limits
        self.budget = ingress.budget
        self.loop = asyncio.get_running_loop()
        self.now_s = self.loop.time
        self.connections: set[_Connection] = set()
        self.is_closing = False
        self.date = formatdate(usegmt=True)
        self._sweeper: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None

    def num_connections(self) -> int:
        """Number of connected clients, those of aiohttp included."""
        return len(self.connections) + len(self.make_web.connections)

    async def listen(self, host: str, port: int) -> int:
        """Start to serve; returns the port. Raises ConfigError if the address cannot be used."""
        try:
            self._server = await self.loop.create_server(
                lambda: _Connection(self),
                host,
                port,
                backlog=1024,
                ssl=self.ingress.tls,
                ssl_handshake_timeout=self.limits.head_s if self.ingress.tls else None,
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._sweep()
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def close(self) -> None:
        """Accept no connections; close idle ones now, and the others when their request is answered."""
        self.is_closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close()

    def _sweep(self) -> None:
        self.date = formatdate(usegmt=True)
        now_s = self.now_s()
        for connection in list(self.connections):
            if connection.deadline_s is not None and connection.deadline_s < now_s:
                connection.expire()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

"""Sends one request to one instance, reads its answer as it comes, and aborts it when told."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from urllib.parse import urlsplit

import aiohttp

from memserve.router.cluster.instance import Instance
from memserve.router.errors import (
    UpstreamDisconnected,
    UpstreamError,
    UpstreamRejected,
    describe,
    message_of,
    refusal,
)
from memserve.router.proxy.connection_pool import (
    Connection,
    ConnectionPool,
    UpstreamExchange,
    UpstreamUnresponsive,
    read_whole,
)
from memserve.router.proxy.names import names_to_abort
from memserve.router.request import Api, GenerationRequest
from memserve.wire.messages import Role

logger = logging.getLogger(__name__)

OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Shortages of the router itself, which are no fault of an instance."""


def open_session(tls: ssl.SSLContext, keepalive_s: float, api_key: str | None) -> aiohttp.ClientSession:
    """The client for everything but generation: probes, aborts, pages. `api_key` is for the instances."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=keepalive_s, ttl_dns_cache=60, ssl=tls)
    headers = {"Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(connector=connector, headers=headers)


class Leg:
    """The answer of one instance to one request. Made by `Upstream.leg`."""

    __slots__ = ("_connection", "instance", "next")

    def __init__(self, instance: Instance, connection: Connection) -> None:
        self.instance = instance
        self._connection = connection
        self.next = connection.next
        """The next bytes, as soon as they come; b"" at the end of the answer."""

    async def read(self) -> bytes:
        """The whole answer."""
        return await self._connection.read()


class Upstream:
    """Sends requests to instances and reports lost instances. Event loop thread only."""

    def __init__(
        self,
        connections: ConnectionPool,
        session: aiohttp.ClientSession,
        *,
        on_lost: Callable[[Instance, str], None],
        abort_timeout_s: float = 3.0,
        abort_again_s: float = 1.0,
    ) -> None:
        """`session` sends aborts; one may overtake its request, so it is sent again after `abort_again_s`.

        `on_lost` receives each instance whose connection failed."""
        self._connections = connections
        self._session = session
        self._on_lost = on_lost
        self._abort_timeout_s = abort_timeout_s
        self._abort_again_s = abort_again_s
        self._aborting: set[asyncio.Task[None]] = set()
        self._legs: dict[UpstreamExchange, tuple[Instance, GenerationRequest]] = {}
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def leg(self, instance: Instance, request: GenerationRequest, body: bytes) -> AsyncIterator[Leg]:
        """Send `body`, this instance's leg of `request`, and wait until it begins to answer 200.

        An exception or cancellation that leaves the block closes the connection and aborts the request.
        Raises UpstreamDisconnected, UpstreamError (5xx) or UpstreamRejected (4xx), also inside the block.
        Sets no time limit.
        """
        exchange = self._begun(instance, request)
        answered = False
        try:
            connection = await exchange.begin(_request(instance, request, body), _answering)
            if connection.status != 200:
                error = _error(instance, connection.status, await connection.read())
                answered = True
                raise error
            yield Leg(instance, connection)
            answered = True
        except OSError as error:
            raise self._lost(instance, error, exchange) from error
        finally:
            self._leave(instance, request, exchange, answered)

    async def fetch(self, instance: Instance, request: GenerationRequest, body: bytes) -> bytes:
        """The whole answer of an instance. Raises and aborts as `leg` does."""
        exchange = self._begun(instance, request)
        answered = False
        try:
            status, answer = await exchange.begin(_request(instance, request, body), read_whole)
            answered = True
            if status != 200:
                raise _error(instance, status, answer)
            return answer
        except OSError as error:
            raise self._lost(instance, error, exchange) from error
        finally:
            self._leave(instance, request, exchange, answered)

    def _begun(self, instance: Instance, request: GenerationRequest) -> UpstreamExchange:
        exchange = UpstreamExchange(self._connections, instance.url)
        self._legs[exchange] = instance, request
        return exchange

    def _leave(
        self, instance: Instance, request: GenerationRequest, exchange: UpstreamExchange, answered: bool
    ) -> None:
        del self._legs[exchange]
        exchange.leave(is_answered=answered)
        if request.trace is not None:
            is_well = answered and sys.exception() is None
            request.trace.left(instance.instance_id, is_answered=is_well)
        if not answered:
            self._abort(instance, request.rids)

    def abort(self, request: GenerationRequest, part: str | None) -> None:
        """Abort the running legs of any attempt of `request`, or of the prompt that answers call `part`.

        Of a pair, decode: it answers the client, and its end ends prefill's leg too.
        """
        for instance, leg in list(self._legs.values()):
            if leg.aborted is request.aborted and instance.role is not Role.PREFILL:
                self._abort(instance, leg.rids if part is None else names_to_abort(leg, (part,)))

    async def close(self) -> None:
        """Wait for running aborts; repeated aborts are sent at once."""
        self._closing.set()
        if self._aborting:
            await asyncio.wait(self._aborting, timeout=self._abort_timeout_s)

    def _lost(self, instance: Instance, error: OSError, exchange: UpstreamExchange) -> UpstreamDisconnected:
        reason = describe(error)
        if exchange.connection is None:
            reason = f"cannot connect ({error.strerror or reason})"
        if error.errno not in OWN_FAULTS:
            self._on_lost(instance, reason)
        # A process that was stopped, or cut off, was not ended by the request.
        may_be_cause = exchange.was_sent and not isinstance(error, UpstreamUnresponsive)
        name, epoch = instance.instance_id, instance.epoch
        return UpstreamDisconnected(
            name, epoch, instance.role, reason, was_sent=may_be_cause, sent_s=exchange.sent_s
        )

    def _abort(self, instance: Instance, rids: Sequence[str]) -> None:
        task = asyncio.create_task(self._send_aborts(instance, rids))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    async def _send_aborts(self, instance: Instance, rids: Sequence[str]) -> None:
        try:
            await self._send_abort(instance, rids)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._abort_again_s)
            await self._send_abort(instance, rids)
        except (aiohttp.ClientError, OSError) as error:
            logger.debug("abort not sent rids=%s instance=%s: %s", rids, instance.instance_id, error)

    async def _send_abort(self, instance: Instance, rids: Sequence[str]) -> None:
        timeout = aiohttp.ClientTimeout(total=self._abort_timeout_s)
        url = instance.url + "/abort_request"
        for rid in rids:
            async with self._session.post(url, json={"rid": rid}, timeout=timeout) as response:
                await response.read()


@lru_cache(maxsize=1024)
def _head(url: str, api: Api) -> str:
    parts = urlsplit(url)
    return (
        f"POST {parts.path.rstrip('/')}{api} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nAccept-Encoding: identity\r\n"
    )


def _request(instance: Instance, request: GenerationRequest, body: bytes) -> bytes:
    head = _head(instance.url, request.api)
    if request.authorization is not None:
        head += f"Authorization: {request.authorization}\r\n"
    if request.trace is not None:
        told = request.trace.leg(instance.instance_id, instance.role)
        head += "".join([f"{name}: {value}\r\n" for name, value in told.items()])
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode(errors="surrogateescape") + body


async def _answering(connection: Connection) -> Connection:
    await connection.answered()
    return connection


def _error(instance: Instance, status: int, text: bytes) -> UpstreamRejected | UpstreamError:
    """The error for an answer that is not 200."""
    if 400 <= status < 500:
        return refusal(status, text)
    return UpstreamError(instance.instance_id, instance.role, status, message_of(status, text))

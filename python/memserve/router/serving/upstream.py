"""One request at one instance: sent, read as it comes, and taken back if it is not wanted any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import msgspec

from memserve.core.errors import InstanceLost
from memserve.router.cluster.instance import Instance
from memserve.router.serving.api import Call
from memserve.router.serving.failures import LegFailed, LegLost, LegRefused, message_of, refusal
from memserve.router.serving.sse import data_of

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 2.0
"""Less than the 5 s after which SGLang closes an idle connection, so that none closes under a request."""
ABORT_TIMEOUT_S = 3.0
ABORT_AGAIN_S = 1.0
"""An abort may overtake the request it means; it is said again after this long."""
_ERROR = b'data: {"error"'


def open_session() -> aiohttp.ClientSession:
    """The router's connections to all instances."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=60)
    return aiohttp.ClientSession(connector=connector, headers={"Accept-Encoding": "identity"})


class Leg:
    """A request that an instance is working on. Made by `Upstream.leg`."""

    def __init__(self, instance: Instance, response: aiohttp.ClientResponse) -> None:
        self.instance = instance
        self._response = response

    async def read(self) -> bytes:
        """The whole answer."""
        return await self._response.read()

    async def first(self) -> bytes:
        """What came first. Raises LegRefused, LegFailed: SGLang refuses streams inside a 200."""
        chunk = await self.next()
        if chunk.startswith(_ERROR):
            raise _refused(self.instance, chunk)
        return chunk

    async def next(self) -> bytes:
        """What came next, as soon as it came; b"" at the end of the answer."""
        return await self._response.content.readany()


class Upstream:
    """Sends requests to instances and reports those that are not there. Event loop thread only."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        on_lost: Callable[[Instance, str], None],
    ) -> None:
        """`on_lost` is told of each instance whose connection failed."""
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._on_lost = on_lost
        self._aborting: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def leg(self, instance: Instance, call: Call, body: bytes) -> AsyncIterator[Leg]:
        """Send `body`, this instance's share of `call`, and wait until it begins to answer 200.

        Leaving with an exception, cancellation included, closes the connection and aborts the call there.
        Raises LegLost, LegFailed (5xx) or LegRefused (4xx), from inside the block too. Sets no limit of time.
        """
        headers = {"Content-Type": "application/json"}
        if call.authorization is not None:
            headers["Authorization"] = call.authorization
        response: aiohttp.ClientResponse | None = None
        answered = False
        try:
            response = await self._session.post(
                instance.url + call.api, data=body, headers=headers, timeout=self._timeout
            )
            if response.status != 200:
                text = await response.read()
                answered = True
                if response.status < 500:
                    raise refusal(response.status, text)
                message = message_of(response.status, text)
                raise LegFailed(instance.instance_id, instance.role, response.status, message)
            yield Leg(instance, response)
            answered = True
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(instance, error) from error
        finally:
            if response is not None:
                response.close() if not answered else response.release()
            if not answered:
                self._abort(instance, call)

    async def fetch(self, instance: Instance, call: Call, body: bytes) -> bytes:
        """The whole answer of an instance. Raises and takes back as `leg` does."""
        async with self.leg(instance, call, body) as leg:
            return await leg.read()

    async def close(self) -> None:
        """Wait for the aborts that are still under way; those to be said again are said at once."""
        self._closing.set()
        if self._aborting:
            await asyncio.wait(self._aborting, timeout=ABORT_TIMEOUT_S)

    def _lost(self, instance: Instance, error: Exception) -> LegLost:
        reason = describe(error)
        self._on_lost(instance, reason)
        return LegLost(instance.instance_id, instance.role, reason)

    def _abort(self, instance: Instance, call: Call) -> None:
        task = asyncio.create_task(self._send_aborts(instance, call))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    async def _send_aborts(self, instance: Instance, call: Call) -> None:
        # A client may use its own rid again at once: a second abort could hit its next request.
        try:
            await self._send_abort(instance, call)
            if not call.rid_is_clients:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), ABORT_AGAIN_S)
                await self._send_abort(instance, call)
        except (aiohttp.ClientError, OSError) as error:
            logger.debug("abort not sent rid=%s instance=%s: %s", call.rid, instance.instance_id, error)

    async def _send_abort(self, instance: Instance, call: Call) -> None:
        timeout = aiohttp.ClientTimeout(total=ABORT_TIMEOUT_S)
        url = instance.url + "/abort_request"
        for rid in call.rids:
            async with self._session.post(url, json={"rid": rid}, timeout=timeout) as response:
                await response.read()


def _refused(instance: Instance, event: bytes) -> LegRefused | LegFailed:
    """The status that is meant is in the event."""
    body = data_of(event)
    code = msgspec.json.decode(body)["error"].get("code")
    if isinstance(code, int) and 500 <= code < 600:
        return LegFailed(instance.instance_id, instance.role, code, message_of(code, body))
    return refusal(code if isinstance(code, int) and 400 <= code < 500 else 400, body)


def describe(error: BaseException) -> str:
    """`error` in a few words, for a log line or an answer."""
    if isinstance(error, InstanceLost):
        return error.reason
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({error.os_error.strerror or error.os_error})"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        return "the connection broke"
    return str(error) or type(error).__name__

"""Passes a request on to one colocated server, and its answer back: bytes in, bytes out, no tokens, no pairs.

    body ── model ──> the least loaded colocated instance ── answer
                         ^        │ it could not be reached: nothing was sent
                         └────────┘ the next one

Serves every endpoint that the table of endpoints passes on. A request that an instance may have received is
not sent again. Servers see the body as the client wrote it: cached blocks are not kept apart by tenant.
Knows no HTTP of clients. Event loop thread only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from memserve.core.errors import BadRequest
from memserve.core.ids import InstanceId
from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.errors import (
    NoRoute,
    RequestTimeout,
    UpstreamDisconnected,
    UpstreamError,
    describe,
    message_of,
    refusal,
)
from memserve.router.proxy.connection_pool import ConnectionPool, UpstreamExchange, read_whole
from memserve.router.proxy.prepare import ClientContext
from memserve.router.proxy.upstream import OWN_FAULTS

OnDispatched = Callable[[Instance, int], None]
"""Gets the instance that a request is sent to, and the number of the attempt, from 1."""


@dataclass(frozen=True, slots=True)
class PassthroughRequest:
    """A request as it is sent on."""

    path: str
    body: bytes
    client: ClientContext


class _Body(msgspec.Struct):
    model: str | None = None


class Passthrough:
    """See the module."""

    def __init__(
        self,
        connections: ConnectionPool,
        candidates: Callable[[str | None], ClusterSnapshot],
        breakers: Breakers,
        num_running: Callable[[InstanceId], int],
        on_lost: Callable[[Instance, str], None],
        *,
        timeout_s: float,
    ) -> None:
        """`candidates` gives the ready instances of a model; `num_running` counts generation requests.

        `on_lost` is called for each instance whose connection failed; `timeout_s` is for the whole answer.
        """
        self._connections = connections
        self._candidates = candidates
        self._breakers = breakers
        self._num_running = num_running
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._running: Counter[InstanceId] = Counter()

    async def answer(self, request: PassthroughRequest, on_dispatched: OnDispatched) -> bytes:
        """The body of the server's 200.

        Raises BadRequest (no JSON object, or an unknown model), NoRoute, UpstreamRejected (4xx),
        UpstreamError (5xx), UpstreamDisconnected, RequestTimeout.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._answer(request, on_dispatched)
        except TimeoutError as error:
            raise RequestTimeout(f"no answer within {self._timeout_s:g} s") from error

    async def _answer(self, request: PassthroughRequest, on_dispatched: OnDispatched) -> bytes:
        candidates = self._candidates(_model_of(request.body))
        tried: list[InstanceId] = []
        while True:
            admitted = self._breakers.admitted(candidates).colocated or candidates.colocated
            left = [one for one in admitted if one.instance_id not in tried]
            if not left and (candidates.prefills or candidates.decodes):
                message = f"{request.path} needs a colocated server, and this model is served by pairs"
                raise BadRequest(message, status=404)
            if not left:
                raise NoRoute("no colocated server is ready")
            instance = min(left, key=self._load)
            tried.append(instance.instance_id)
            on_dispatched(instance, len(tried))
            try:
                return await self._attempt(instance, request)
            except UpstreamDisconnected as error:
                if error.was_sent or len(left) == 1:
                    raise

    def _load(self, instance: Instance) -> int:
        name = instance.instance_id
        return self._running[name] + self._num_running(name)

    async def _attempt(self, instance: Instance, request: PassthroughRequest) -> bytes:
        name, trace = instance.instance_id, request.client.trace
        self._breakers.sent(instance)
        self._running[name] += 1
        exchange = UpstreamExchange(self._connections, instance.url)
        is_answered = False
        try:
            status, answer = await exchange.begin(_encoded(instance, request), read_whole)
            is_answered = True
        except OSError as error:
            reason = describe(error)
            if error.errno not in OWN_FAULTS:
                self._on_lost(instance, reason)
            raise UpstreamDisconnected(
                name, instance.epoch, instance.role, reason, was_sent=exchange.was_sent
            ) from error
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
            exchange.leave(is_answered=is_answered)
            if trace is not None:
                trace.left(name, is_answered=is_answered)
        return self._checked(instance, status, answer)

    def _checked(self, instance: Instance, status: int, answer: bytes) -> bytes:
        if status >= 500:
            self._breakers.failed(instance)
            raise UpstreamError(instance.instance_id, instance.role, status, message_of(status, answer))
        self._breakers.answered(instance)
        if status != 200:
            raise refusal(status, answer)
        return answer


def _model_of(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=_Body).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not a JSON object with a model: {error}") from error


def _encoded(instance: Instance, request: PassthroughRequest) -> bytes:
    parts, client = urlsplit(instance.url), request.client
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(request.body)),
    }
    if client.authorization is not None:
        headers["Authorization"] = client.authorization
    if client.trace is not None:
        headers |= client.trace.leg(instance.instance_id, instance.role)
    lines = [f"POST {parts.path.rstrip('/')}{request.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode(errors="surrogateescape") + request.body

"""The stops that a generation or a passed-on request goes through, each once; only the answer comes back.

    1  server.HttpServer           head and body of a plain POST; aiohttp reads all other requests
    2  RequestChain.serve          request id, CORS, deadline ┐
    3    authentication            tenant, upstream key       ├ one ClientRequest
    4    admission, byte budget    a slot, in bounded time    ┘
    5  RequestPreparer.prepare     validate, salt, tokenize, keys, capacity: one PreparedRequest
    6  Dispatcher                  select, execute, retry
    7  RequestExecutor, Upstream   the legs; their bytes go to
    8  Exchange                    the sink

When the request ends, the chain makes one RequestRecord of it for log, metrics and trace. Knows no dispatch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from math import isfinite

import msgspec
from aiohttp import web

from memserve.core.errors import BadRequest, MemServeError
from memserve.router.admission.controller import SERVED_FACTOR, AdmissionSlot
from memserve.router.errors import CLIENT_LEFT_STATUS, ClientLeft, RequestTimeout, ShuttingDown, failure_of
from memserve.router.http.exchange import Bodies, Exchange, WebExchange
from memserve.router.http.ingress import Ingress
from memserve.router.proxy.placement import Placement
from memserve.router.proxy.prepare import ClientContext
from memserve.router.records import RequestRecord, RequestTrace, Traces
from memserve.router.request import RequestIds
from memserve.router.tenant import SOLE_TENANT, Tenant
from memserve.scheduling.assignment import Assignment

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
MAX_ID_CHARS = 256
"""Longest request id of a client that is logged and sent back."""
TIMEOUT = "x-request-timeout-secs"
"""Header: seconds from the arrival of the request within which its whole answer has to be sent."""
REPORT = "x-memserve-report"
"""Header: a stream ends with a comment about what the prefill reused."""
ATTEMPTS = "x-memserve-attempts"
"""Header of an answer: the number of attempts, if it took more than one."""
PRIORITY = "x-priority"
"""Header: an integer; a tenant's higher ones get their slot first. Overrides SGLang's field."""
MAX_PRIORITY = 1 << 31


class ClientRequest(msgspec.Struct):
    """A request and everything that becomes known of it until its end."""

    exchange: Exchange
    begun_s: float
    """Monotonic clock."""
    trace: RequestTrace | None = None
    client: ClientContext = ClientContext()
    raw: bytes = b""
    """Its body."""
    slot: AdmissionSlot | None = None
    """Set while it runs."""
    rid: str = "-"
    route: object = "-"
    """The instances that serve it."""
    attempts: int = 0
    assignment: Assignment | None = None
    status: int = 200
    reason: str = "-"

    def dispatched(self, placement: Placement, attempt: int) -> None:
        """Instances are selected; attempts are numbered from 1."""
        self.route, self.assignment, self.attempts = placement.route, placement.assignment, attempt
        if self.trace is not None:
            self.trace.placed(placement.assignment)

    def record(self, now_s: float) -> RequestRecord:
        """The record of the request, which ends now."""
        assignment, exchange, begun_s = self.assignment, self.exchange, self.begun_s
        first_s = exchange.begun_s
        if first_s is None and assignment is not None:
            first_s = assignment.prefilled_s
        return RequestRecord(
            time.time(),
            exchange.path,
            self.rid,
            _as_text(exchange.reply.get(REQUEST_ID, "-")),
            self.status,
            now_s - begun_s,
            self.route,
            self.reason,
            self.attempts,
            None if first_s is None else first_s - begun_s,
            exchange.num_events,
            None if assignment is None else assignment.prompt.num_tokens,
            None if assignment is None else assignment.cached_tokens,
            None if assignment is None else assignment.prompt.unknown,
            None if assignment is None else assignment.decision,
        )


Work = Callable[[ClientRequest], Awaitable[None]]
"""Answers a request that has been admitted. Raises MemServeError, also after it has begun to answer."""


class RequestChain:
    """See the module. Event loop thread only."""

    def __init__(
        self,
        ingress: Ingress,
        record: Callable[[RequestRecord], None],
        traces: Traces,
        id_headers: Sequence[str],
        cors: Callable[[str | None], Mapping[str, str]] | None = None,
    ) -> None:
        """`id_headers` may carry the client's request id; `cors` gives headers for an origin."""
        self.access = ingress.access
        self.admission = ingress.admission
        self.bodies = Bodies(ingress)
        self._ingress = ingress
        self._record = record
        self._traces = traces
        self._id_headers = tuple(map(str.lower, id_headers)) or (REQUEST_ID,)
        self._cors = cors
        self._ids = RequestIds()
        self._running: set[asyncio.Task[object]] = set()
        self._is_stopping = False

    async def serve(self, exchange: Exchange, work: Work) -> None:
        """Answer one request. The client's leaving cancels this, which aborts the legs."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        trace = self._traces.begin(exchange.path, exchange.headers)
        request = ClientRequest(exchange, time.monotonic(), trace)
        try:
            await self._answer(request, work)
        except asyncio.CancelledError:
            request.status, request.reason = CLIENT_LEFT_STATUS, "the client left"
            raise
        finally:
            self._running.discard(task)
            self._end(request)

    async def serve_web(self, request: web.Request, work: Work) -> web.StreamResponse:
        """The same for a request that aiohttp reads."""
        exchange = WebExchange(request, self.bodies)
        try:
            await self.serve(exchange, work)
        finally:
            exchange.close()
        assert exchange.response is not None
        return exchange.response

    def client_of(
        self,
        headers: Mapping[str, str],
        tenant: Tenant,
        timeout_s: float | None,
        trace: RequestTrace | None = None,
    ) -> ClientContext:
        """The facts about a request that are not in its body."""
        return ClientContext(
            headers,
            tenant=None if tenant is SOLE_TENANT else tenant.name,
            authorization=self.access.upstream_authorization(headers.get("authorization")),
            timeout_s=timeout_s,
            wants_report=headers.get(REPORT, "0") != "0",
            trace=trace,
        )

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests; after `grace_s`, end those that still run with a retryable error."""
        self._is_stopping = True
        if self._running:
            logger.info("waiting for %d running requests", len(self._running))
            await asyncio.wait(self._running, timeout=grace_s)
        if left := list(self._running):
            for task in left:
                task.cancel()
            await asyncio.wait(left)

    async def _answer(self, request: ClientRequest, work: Work) -> None:
        """Run the request within its deadline, and answer its error if it has one."""
        exchange = request.exchange
        headers, reply = exchange.headers, exchange.reply
        given = next(filter(None, map(headers.get, self._id_headers)), None)
        reply[REQUEST_ID] = given[:MAX_ID_CHARS] if given else self._ids.new()
        if self._cors is not None:
            reply |= self._cors(headers.get("origin"))
        try:
            timeout_s = timeout_of(headers)
            if timeout_s is None:
                await self._admit(request, None, work)
            else:
                async with _deadline(timeout_s):
                    await self._admit(request, timeout_s, work)
            return
        except asyncio.CancelledError as cancelled:
            if not self._is_stopping:
                raise
            error: MemServeError = ShuttingDown("the router was stopped")
            error.__cause__ = cancelled
        except MemServeError as failed:
            error = failed
        failure = failure_of(error)
        request.status, request.reason = failure.status, str(error)
        if not exchange.has_begun:
            reply |= failure.headers()
            exchange.answer(failure.body(), failure.status)
            return
        with suppress(ClientLeft):
            await exchange.write(failure.event())
            await exchange.end()

    async def _admit(self, request: ClientRequest, timeout_s: float | None, work: Work) -> None:
        """Authenticate, wait for a slot, take memory, and run `work`."""
        if self._is_stopping:
            raise ShuttingDown("the router is stopping")
        exchange, budget = request.exchange, self._ingress.budget
        headers = exchange.headers
        tenant = self.access.authenticate(headers.get("authorization"))
        raw = request.raw = await exchange.body()
        async with self.admission.admitted(tenant, lambda: priority_of(headers, raw)) as slot:
            num_bytes = len(raw) * SERVED_FACTOR
            if not budget.try_take(num_bytes):
                raise self._ingress.out_of_memory()
            try:
                if request.trace is not None:
                    request.trace.admitted()
                request.client = self.client_of(headers, tenant, timeout_s, request.trace)
                request.slot = slot
                await work(request)
            finally:
                budget.give(num_bytes)

    def _end(self, request: ClientRequest) -> None:
        """Record, log and trace the end of a request."""
        record = request.record(time.monotonic())
        self._record(record)
        if request.trace is not None:
            request.trace.end(record)
        level = logging.DEBUG if record.status == 200 else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "request end path=%s request_id=%s rid=%s instances=%s status=%d ms=%.1f reason=%s",
                *(record.path, record.request_id, record.rid, record.route),
                *(record.status, record.seconds * 1000, record.reason),
            )


def _as_text(value: str) -> str:
    """A header's value for logs and JSON: bytes that are no UTF-8 become escapes."""
    return value.encode(errors="surrogateescape").decode(errors="backslashreplace")


def timeout_of(headers: Mapping[str, str]) -> float | None:
    """The client's deadline in seconds. Raises BadRequest if the header is not a positive number."""
    text = headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not (isfinite(timeout_s) and timeout_s > 0):
        raise BadRequest(f"{TIMEOUT} has to be a number of seconds more than 0", field=TIMEOUT)
    return timeout_s


class _Priority(msgspec.Struct):
    priority: int | None = None


def priority_of(headers: Mapping[str, str], body: bytes) -> int:
    """The priority in the header, or in the body; 0 without a valid one."""
    text = headers.get(PRIORITY)
    if text is not None:
        try:
            return max(-MAX_PRIORITY, min(MAX_PRIORITY, int(text[:20])))
        except ValueError:
            return 0
    if b'"priority"' not in body:
        return 0
    try:
        return msgspec.json.decode(body, type=_Priority).priority or 0
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0  # `prepare` reports the error


@asynccontextmanager
async def _deadline(timeout_s: float) -> AsyncIterator[None]:
    """A block that is cancelled after `timeout_s`, which raises RequestTimeout."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise RequestTimeout(f"no answer within {timeout_s:g} s") from error

"""The router's HTTP API for generating: reads a request, has it run, writes the answer or the error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from memserve.core.errors import MemServeError
from memserve.router.admission.controller import SERVED_FACTOR, AdmissionSlot
from memserve.router.admission.priority import priority_of
from memserve.router.cluster.instance import Route
from memserve.router.errors import CLIENT_LEFT_STATUS, ClientLeft, ShuttingDown, failure_of
from memserve.router.http.deadlines import in_time, timeout_of
from memserve.router.http.exchange import Bodies, Exchange, WebExchange, json_response
from memserve.router.http.ingress import Ingress
from memserve.router.proxy.dispatcher import Dispatcher
from memserve.router.proxy.prepare import ClientContext, RequestPreparer
from memserve.router.records import RequestRecord, RequestTrace, Traces
from memserve.router.request import Api, RequestIds, encode_json
from memserve.router.tenant import SOLE_TENANT, Tenant
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.explain import MAX_LISTED, explained

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
MAX_ID_CHARS = 256
"""Of a client's own, which is logged and sent back."""
REPORT = "x-memserve-report"
EXPLAIN = "x-memserve-explain"
ATTEMPTS = "x-memserve-attempts"
"""The header that tells how often a request was tried, if more than once."""
TENANT = "x-memserve-tenant"
"""The header by which an admin says whose request `POST /explain` is about."""
DECISION = "x-memserve-decision"
"""The header of an answer whose request asked for an explanation: JSON, as `POST /explain` answers."""


@dataclass(slots=True)
class _Log:
    """What the one line at the end of a request says."""

    api: Api
    rid: str = "-"
    route: Route | str = "-"
    status: int = 200
    reason: str = "-"
    attempts: int = 0
    placed: Assignment | None = None
    trace: RequestTrace | None = None

    def ended(self, exchange: Exchange, begun_s: float, now_s: float) -> RequestRecord:
        """What is kept of the request, which began and ended at these times of the monotonic clock."""
        placed = self.placed
        first_s = exchange.begun_s
        if first_s is None and placed is not None:
            first_s = placed.prefilled_s
        return RequestRecord(
            time.time(),
            self.api,
            self.rid,
            exchange.reply.get(REQUEST_ID, "-"),
            self.status,
            now_s - begun_s,
            self.route,
            self.reason,
            self.attempts,
            None if first_s is None else first_s - begun_s,
            exchange.num_events,
            None if placed is None else placed.prompt.num_tokens,
            None if placed is None else placed.cached_tokens,
            None if placed is None else placed.prompt.unknown,
            None if placed is None else placed.decision,
        )


class GenerateHandler:
    """Serves the endpoints of `Api`. Event loop thread only."""

    def __init__(
        self,
        preparer: RequestPreparer,
        dispatcher: Dispatcher,
        record: Callable[[RequestRecord], None],
        ingress: Ingress,
        id_headers: Sequence[str],
        cors: Callable[[str | None], Mapping[str, str]] | None,
        traces: Traces,
    ) -> None:
        self._preparer = preparer
        self._dispatcher = dispatcher
        self._access = ingress.access
        self._admission = ingress.admission
        self._budget = ingress.budget
        self._out_of_memory = ingress.out_of_memory
        self._bodies = Bodies(ingress)
        self._record = record
        self._traces = traces
        self._id_headers = tuple(map(str.lower, id_headers)) or (REQUEST_ID,)
        self._cors = cors
        self._running: set[asyncio.Task[object]] = set()
        self._names = RequestIds()
        self._stopping = False

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request. The client's leaving cancels this, which aborts both legs."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        log, start = _Log(exchange.api), time.monotonic()
        log.trace = self._traces.begin(exchange.api, exchange.headers)
        try:
            await self._handle(exchange, log)
        except asyncio.CancelledError:
            log.status, log.reason = CLIENT_LEFT_STATUS, "the client left"
            raise
        finally:
            self._running.discard(task)
            now_s = time.monotonic()
            ended = log.ended(exchange, start, now_s)
            self._record(ended)
            if log.trace is not None:
                log.trace.end(ended)
            level = logging.DEBUG if log.status == 200 else logging.INFO
            if logger.isEnabledFor(level):
                elapsed_ms = (now_s - start) * 1000
                logger.log(
                    level,
                    "request end path=%s request_id=%s rid=%s instances=%s status=%d ms=%.1f reason=%s",
                    *(log.api, exchange.reply.get(REQUEST_ID, "-"), log.rid, log.route),
                    *(log.status, elapsed_ms, log.reason),
                )

    async def handle_web(self, request: web.Request) -> web.StreamResponse:
        """The same for a request that aiohttp has read."""
        exchange = WebExchange(request, self._bodies)
        try:
            await self.handle(exchange)
        finally:
            exchange.close()
        assert exchange.response is not None
        return exchange.response

    async def explain(self, request: web.Request) -> web.Response:
        """Where a request would go, and why; nothing is sent. The body is that of any generating endpoint."""
        raw = b""
        try:
            tenant = self._access.authenticate_as(
                request.headers.get("authorization"), request.headers.get(TENANT)
            )
            raw = await self._bodies.read(request)
            async with self._admission.admitted(tenant, lambda: priority_of(request.headers, raw)):
                job = await self._preparer.prepare(None, raw, self._client(request.headers, tenant))
                decision = self._dispatcher.explain(job)
        except MemServeError as error:
            failed = failure_of(error)
            return json_response(failed.body(), failed.status, failed.headers())
        finally:
            self._bodies.give(raw)
        return json_response(encode_json(explained(decision, job.prompt)))

    async def stop(self, grace_s: float) -> None:
        """Take nothing new; give what runs `grace_s` to end, then end it with a retryable error."""
        self._stopping = True
        if self._running:
            logger.info("waiting for %d running requests", len(self._running))
            await asyncio.wait(self._running, timeout=grace_s)
        if left := list(self._running):
            for task in left:
                task.cancel()
            await asyncio.wait(left)

    async def _handle(self, exchange: Exchange, log: _Log) -> None:
        given = next(filter(None, map(exchange.headers.get, self._id_headers)), None)
        exchange.reply[REQUEST_ID] = given[:MAX_ID_CHARS] if given else self._names.new()
        if self._cors is not None:
            exchange.reply |= self._cors(exchange.headers.get("origin"))
        try:
            timeout_s = timeout_of(exchange.headers)
            if timeout_s is None:
                await self._run(exchange, log)
            else:
                async with in_time(timeout_s):
                    await self._run(exchange, log)
            return
        except asyncio.CancelledError as cancelled:
            if not self._stopping:
                raise
            error: MemServeError = ShuttingDown("the router was stopped")
            error.__cause__ = cancelled
        except MemServeError as failed:
            error = failed
        failure = failure_of(error)
        log.status, log.reason = failure.status, str(error)
        if not exchange.has_begun:
            exchange.reply |= failure.headers()
            exchange.answer(failure.body(), failure.status)
            return
        with suppress(ClientLeft):
            await exchange.write(failure.event())
            await exchange.end()

    async def _run(self, exchange: Exchange, log: _Log) -> None:
        if self._stopping:
            raise ShuttingDown("the router is stopping")
        tenant = self._access.authenticate(exchange.headers.get("authorization"))
        raw = await exchange.body()
        async with self._admission.admitted(tenant, lambda: priority_of(exchange.headers, raw)) as admitted:
            num_bytes = len(raw) * SERVED_FACTOR
            if not self._budget.try_take(num_bytes):
                raise self._out_of_memory()
            try:
                await self._admitted(exchange, raw, log, tenant, admitted)
            finally:
                self._budget.give(num_bytes)

    async def _admitted(
        self, exchange: Exchange, raw: bytes, log: _Log, tenant: Tenant, admitted: AdmissionSlot
    ) -> None:
        if log.trace is not None:
            log.trace.admitted()
        client = self._client(exchange.headers, tenant, log.trace)
        job = await self._preparer.prepare(exchange.api, raw, client)
        log.rid = (call := job.call).rid
        if admitted.is_charged:
            admitted.charge(job.prompt.num_tokens + call.max_output_tokens)

        def on_placed(placed: Assignment, attempt: int) -> None:
            log.route, log.placed, log.attempts = placed.route, placed, attempt
            if log.trace is not None:
                log.trace.placed(placed)
            if attempt > 1:
                exchange.reply[ATTEMPTS] = str(attempt)
            if exchange.headers.get(EXPLAIN, "0") != "0":
                told = explained(placed.decision, job.prompt, MAX_LISTED)
                exchange.reply[DECISION] = encode_json(told).decode()

        if call.is_stream:
            await self._dispatcher.stream(job, on_placed, exchange)
            await exchange.end()
        else:
            exchange.answer(await self._dispatcher.answer(job, on_placed))

    def _client(
        self, headers: Mapping[str, str], tenant: Tenant, trace: RequestTrace | None = None
    ) -> ClientContext:
        return ClientContext(
            headers,
            tenant=None if tenant is SOLE_TENANT else tenant.name,
            authorization=self._access.upstream_authorization(headers.get("authorization")),
            timeout_s=timeout_of(headers),
            wants_report=headers.get(REPORT, "0") != "0",
            trace=trace,
        )

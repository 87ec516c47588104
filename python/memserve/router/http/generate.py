"""The router's HTTP API for generating: reads a request, has it run, writes the answer or the error."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, replace

from aiohttp import web

from memserve.core.errors import BadRequest, MemServeError
from memserve.router.cluster.instance import Snapshot
from memserve.router.http.tenants import Tenants, salted
from memserve.router.observe.metrics import RouterMetrics
from memserve.router.placing.explain import MAX_LISTED, explained
from memserve.router.placing.placed import Placed
from memserve.router.serving.api import Api, Call, JsonObject, encode_json
from memserve.router.serving.client import ClientStream
from memserve.router.serving.dispatch import Dispatcher
from memserve.router.serving.failures import CLIENT_LEFT_STATUS, ShuttingDown, failure_of
from memserve.router.serving.validation import Limits, read_body, read_call

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
REPORT = "x-memserve-report"
EXPLAIN = "x-memserve-explain"
ATTEMPTS = "x-memserve-attempts"
"""The header that tells how often a request was tried, if more than once."""
DECISION = "x-memserve-decision"
"""The header of an answer whose request asked for an explanation: JSON, as `POST /explain` answers."""


@dataclass(slots=True)
class _Log:
    """What the one line at the end of a request says."""

    api: Api
    rid: str = "-"
    route: str = "-"
    status: int = 200
    reason: str = "-"


class GenerateHandler:
    """Serves the endpoints of `Api`. Event loop thread only."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        *,
        max_body_bytes: int,
        tenants: Tenants | None = None,
    ) -> None:
        """`tenants`: who may ask; None: everybody, and all share one cache."""
        self._dispatcher = dispatcher
        self._tenants = tenants
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._running: set[asyncio.Task[object]] = set()
        self._stopping = False

    def routes(self) -> list[web.RouteDef]:
        """Where these endpoints are served; SGLang takes PUT for /generate too."""
        return [
            *(web.post(api, self.handle) for api in Api),
            web.put(Api.GENERATE, self.handle),
            web.post("/explain", self.explain),
        ]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request. The client's leaving cancels this, which aborts both legs."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        log, start = _Log(Api(request.path)), time.monotonic()
        try:
            return await self._handle(request, log)
        except asyncio.CancelledError:
            log.status, log.reason = CLIENT_LEFT_STATUS, "the client left"
            raise
        finally:
            self._running.discard(task)
            self._metrics.requests.labels(log.api, log.status).inc()
            elapsed_ms = (time.monotonic() - start) * 1000
            logger.info(
                "request end path=%s rid=%s instances=%s status=%d ms=%.1f reason=%s",
                *(log.api, log.rid, log.route, log.status, elapsed_ms, log.reason),
            )

    async def explain(self, request: web.Request) -> web.Response:
        """Where a request would go, and why; nothing is sent. The body is that of any generating endpoint."""
        try:
            body = read_body(await self._read(request))
            api = Api.CHAT if "messages" in body else Api.COMPLETIONS if "prompt" in body else Api.GENERATE
            call, candidates = self._checked(request, api, body)
            job = await self._dispatcher.read(call, candidates, request.headers)
            decision = self._dispatcher.explain(job)
        except MemServeError as error:
            failed = failure_of(error)
            return json_response(failed.body(), failed.status)
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

    async def _handle(self, request: web.Request, log: _Log) -> web.StreamResponse:
        headers = {REQUEST_ID: request.headers.get(REQUEST_ID) or secrets.token_hex(16)}
        stream = ClientStream(request, headers)
        try:
            return await self._run(request, headers, stream, log)
        except asyncio.CancelledError as cancelled:
            if not self._stopping:
                raise
            error: MemServeError = ShuttingDown("the router was stopped")
            error.__cause__ = cancelled
        except MemServeError as failed:
            error = failed
        failure = failure_of(error)
        log.status, log.reason = failure.status, str(error)
        if stream.response is None:
            return json_response(failure.body(), failure.status, headers)
        await stream.fail(failure)
        return stream.response

    async def _run(
        self, request: web.Request, headers: dict[str, str], stream: ClientStream, log: _Log
    ) -> web.StreamResponse:
        if self._stopping:
            raise ShuttingDown("the router is stopping")
        call, candidates = self._checked(request, Api(request.path), read_body(await self._read(request)))
        log.rid = call.rid
        job = await self._dispatcher.read(call, candidates, request.headers)

        def on_placed(placed: Placed, attempt: int) -> None:
            log.route = str(placed.route)
            if attempt > 1:
                headers[ATTEMPTS] = str(attempt)
            if request.headers.get(EXPLAIN, "0") != "0":
                told = explained(placed.decision, job.prompt, MAX_LISTED)
                headers[DECISION] = encode_json(told).decode()

        if not call.is_stream:
            return json_response(await self._dispatcher.answer(job, on_placed), 200, headers)
        await self._dispatcher.stream(job, on_placed, stream)
        return await stream.end()

    def _checked(self, request: web.Request, api: Api, body: JsonObject) -> tuple[Call, Snapshot]:
        """The call in a request, and who could serve it."""
        authorization = request.headers.get("authorization")
        tenant = None if self._tenants is None else self._tenants.tenant_of(authorization)
        model = body.get("model") if api is not Api.GENERATE else None
        candidates = self._dispatcher.candidates(model if isinstance(model, str) else None)
        call = replace(
            read_call(api, body, limits_of(candidates), new_rid=secrets.token_hex(16)),
            body_bytes=request.content_length or 0,
            authorization=authorization,
            wants_report=request.headers.get(REPORT, "0") != "0",
        )
        return (call if tenant is None else salted(call, tenant)), candidates

    async def _read(self, request: web.Request) -> bytes:
        too_large = BadRequest(f"the body is larger than {self._max_body_bytes} bytes", status=413)
        if (request.content_length or 0) > self._max_body_bytes:
            raise too_large
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large from error


def limits_of(snapshot: Snapshot) -> Limits:
    """What all of these instances take."""
    facts = [instance.facts for instance in snapshot.all()]
    return Limits(
        vocab_size=min((one.vocab_size for one in facts if one.vocab_size), default=None),
        context_tokens=min((one.context_tokens for one in facts if one.context_tokens), default=None),
        takes_empty_text=all(one.takes_empty_text for one in facts),
    )


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A whole answer that is JSON already."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")

"""The endpoints that generate, those that are passed on, and /explain: run requests that are admitted."""

from __future__ import annotations

from aiohttp import web

from memserve.router.cluster.instance import Instance
from memserve.router.http.exchange import Exchange, json_response
from memserve.router.http.request_chain import ATTEMPTS, ClientRequest, RequestChain, priority_of, timeout_of
from memserve.router.proxy.dispatcher import Dispatcher
from memserve.router.proxy.names import told_name
from memserve.router.proxy.passthrough import Passthrough, PassthroughRequest
from memserve.router.proxy.placement import Placement
from memserve.router.proxy.prepare import RequestPreparer
from memserve.router.request import Api, encode_json
from memserve.router.tokenization.text_keys import BYTES_PER_TOKEN
from memserve.scheduling.explain import MAX_LISTED, explained

EXPLAIN = "x-memserve-explain"
"""Header: the answer explains the decision in a header."""
DECISION = "x-memserve-decision"
"""Header of such an answer: JSON, as `POST /explain` answers."""
TENANT = "x-memserve-tenant"
"""Header: the tenant whose request an admin explains."""


class GenerateHandler:
    """Serves the endpoints of `Api`. Event loop thread only."""

    def __init__(self, chain: RequestChain, preparer: RequestPreparer, dispatcher: Dispatcher) -> None:
        self._chain = chain
        self._preparer = preparer
        self._dispatcher = dispatcher

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        await self._chain.serve(exchange, self._generate)

    async def handle_web(self, request: web.Request) -> web.StreamResponse:
        """The same for a request that aiohttp reads."""
        return await self._chain.serve_web(request, self._generate)

    async def explain(self, request: web.Request) -> web.Response:
        """The decision for a request, which is not sent. The body is that of any generating endpoint."""
        chain, headers = self._chain, request.headers
        tenant = chain.access.authenticate_as(headers.get("authorization"), headers.get(TENANT))
        raw = await chain.bodies.read(request)
        try:
            async with chain.admission.admitted(tenant, lambda: priority_of(headers, raw)):
                client = chain.client_of(headers, tenant, timeout_of(headers))
                prepared = await self._preparer.prepare(None, raw, client)
                decision = self._dispatcher.explain(prepared)
        finally:
            chain.bodies.give(raw)
        return json_response(encode_json(explained(decision, prepared.prompt.unknown)))

    async def _generate(self, request: ClientRequest) -> None:
        """Answer an admitted request."""
        exchange = request.exchange
        prepared = await self._preparer.prepare(Api(exchange.path), request.raw, request.client)
        call = prepared.request
        request.rid = told_name(call, call.rid)
        if request.slot is not None and request.slot.is_charged:
            request.slot.charge(prepared.prompt.num_tokens + call.max_output_tokens)

        def on_placed(placement: Placement, attempt: int) -> None:
            request.dispatched(placement, attempt)
            if attempt > 1:
                exchange.reply[ATTEMPTS] = str(attempt)
            if exchange.headers.get(EXPLAIN, "0") != "0":
                decision = explained(placement.decision, prepared.prompt.unknown, MAX_LISTED)
                exchange.reply[DECISION] = encode_json(decision).decode()

        if call.is_stream:
            await self._dispatcher.stream(prepared, on_placed, exchange)
            await exchange.end()
        else:
            exchange.answer(await self._dispatcher.answer(prepared, on_placed))


class PassthroughHandler:
    """Serves the endpoints that the table passes on. Event loop thread only."""

    def __init__(self, chain: RequestChain, passthrough: Passthrough) -> None:
        self._chain = chain
        self._passthrough = passthrough

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        return await self._chain.serve_web(request, self._pass_on)

    async def _pass_on(self, request: ClientRequest) -> None:
        exchange, slot = request.exchange, request.slot
        if slot is not None and slot.is_charged:
            slot.charge(len(request.raw) // BYTES_PER_TOKEN)

        def on_dispatched(instance: Instance, attempt: int) -> None:
            request.route, request.attempts = instance.instance_id, attempt
            if attempt > 1:
                exchange.reply[ATTEMPTS] = str(attempt)

        passed = PassthroughRequest(exchange.path, request.raw, request.client)
        exchange.answer(await self._passthrough.answer(passed, on_dispatched))

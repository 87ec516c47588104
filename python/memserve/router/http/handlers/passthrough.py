"""The endpoints that are only passed on: hand an admitted request to `Passthrough`."""

from __future__ import annotations

from aiohttp import web

from memserve.router.cluster.instance import Instance
from memserve.router.http.request_chain import ATTEMPTS, ClientRequest, RequestChain
from memserve.router.proxy.passthrough import Passthrough, PassthroughRequest
from memserve.router.tokenization.text_keys import BYTES_PER_TOKEN


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

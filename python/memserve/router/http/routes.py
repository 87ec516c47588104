"""The router's HTTP as a whole: which routes, behind which checks, on which sockets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from aiohttp import web

from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.router.config import RouterConfig
from memserve.router.errors import failure
from memserve.router.http import openapi
from memserve.router.http.cors import Cors
from memserve.router.http.handlers.generate import GenerateHandler, json_response
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.ingress import Ingress
from memserve.router.http.permissions import PAGE_BODY_BYTES, Guard, is_clients
from memserve.router.http.server import HttpServer
from memserve.router.http.web_log import web_logger

logger = logging.getLogger(__name__)


def web_app(config: RouterConfig, door: Ingress, routes: Sequence[web.RouteDef]) -> web.Application:
    """All pages, guarded."""
    middlewares = [_answer_errors, Guard(door).middleware()]
    if cors := Cors(config.observe.cors_allowed_origins):
        middlewares.insert(0, cors.middleware(is_clients))
    app = web.Application(client_max_size=PAGE_BODY_BYTES, middlewares=middlewares)
    app.add_routes(routes)
    app.router.add_get("/openapi.json", openapi.page)
    return app


async def serve_http(
    stack: AsyncExitStack,
    config: RouterConfig,
    generate: GenerateHandler,
    app: web.Application,
    door: Ingress,
) -> int:
    """Start the HTTP server; its port."""
    runner = web.AppRunner(
        app, access_log=None, logger=web_logger(), handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    front = HttpServer(generate.handle, runner.server, door)
    stack.push_async_callback(front.close)
    return await front.listen(config.host, config.port)


async def serve_metrics(stack: AsyncExitStack, config: RouterConfig, pages: InfoHandlers) -> None:
    """Serve them on a port of their own too, if that is wanted."""
    port, host = config.observe.metrics_port, config.observe.prometheus_host or config.host
    if port is None:
        return
    app = web.Application()
    app.router.add_get("/metrics", pages.metrics)
    runner = web.AppRunner(app, access_log=None, logger=web_logger(), shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    logger.info("metrics ready http=http://%s:%d/metrics", bracketed(host), runner.addresses[0][1])


@web.middleware
async def _answer_errors(request: web.Request, handler: web.Handler) -> web.StreamResponse:  # type: ignore[name-defined]
    """Give aiohttp's own refusals (unknown path, wrong method) the envelope of all others."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return json_response(
            failure(error.status, f"{request.method} {request.path}: {error.reason}").body(), error.status
        )

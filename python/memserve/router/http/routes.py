"""Puts the HTTP server together: routes, middleware, sockets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from aiohttp import web

from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.router.http.config import HttpConfig
from memserve.router.http.cors import Cors
from memserve.router.http.handlers.generate import GenerateHandler
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.ingress import Ingress
from memserve.router.http.middleware import SMALL_BODY_BYTES, Guard
from memserve.router.http.server import HttpServer
from memserve.router.http.web_connection import WebConnections, web_logger

logger = logging.getLogger(__name__)


def web_app(cors: Cors, ingress: Ingress, routes: Sequence[web.RouteDef]) -> web.Application:
    """All endpoints, behind the middleware."""
    app = web.Application(client_max_size=SMALL_BODY_BYTES)
    if cors:
        cors.add_to(app)
    app.middlewares.append(Guard(ingress).middleware())
    app.add_routes(routes)
    return app


async def serve_http(
    stack: AsyncExitStack,
    config: HttpConfig,
    generate: GenerateHandler,
    app: web.Application,
    ingress: Ingress,
    cors: Cors,
) -> int:
    """Start the HTTP server; returns its port."""
    runner = web.AppRunner(
        app, access_log=None, logger=web_logger(), handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    make_web = WebConnections(runner.server, cors, ingress.limits)
    server = HttpServer(generate.handle, make_web, ingress, cors)
    stack.push_async_callback(server.close)
    return await server.listen(config.host, config.port)


async def serve_metrics(stack: AsyncExitStack, host: str, port: int, info: InfoHandlers) -> None:
    """Serve /metrics on a port of its own, too."""
    app = web.Application()
    app.router.add_get("/metrics", info.metrics)
    runner = web.AppRunner(app, access_log=None, logger=web_logger(), shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    logger.info("metrics ready http=http://%s:%d/metrics", bracketed(host), runner.addresses[0][1])

"""Puts the HTTP server together: routes, middleware, sockets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.router.http.config import HttpConfig
from memserve.router.http.handlers.generate import GenerateHandler
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.ingress import Ingress
from memserve.router.http.middleware import SMALL_BODY_BYTES, Cors, Guard, error_envelope
from memserve.router.http.server import HttpServer

logger = logging.getLogger(__name__)


def web_app(cors: Cors, ingress: Ingress, routes: Sequence[web.RouteDef]) -> web.Application:
    """All endpoints, behind the middleware."""
    middlewares = [error_envelope, Guard(ingress).middleware()]
    if cors:
        middlewares.insert(0, cors.middleware())
    app = web.Application(client_max_size=SMALL_BODY_BYTES, middlewares=middlewares)
    app.add_routes(routes)
    return app


async def serve_http(
    stack: AsyncExitStack,
    config: HttpConfig,
    generate: GenerateHandler,
    app: web.Application,
    ingress: Ingress,
) -> int:
    """Start the HTTP server; returns its port."""
    runner = web.AppRunner(
        app, access_log=None, logger=_web_logger(), handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    server = HttpServer(generate.handle, runner.server, ingress)
    stack.push_async_callback(server.close)
    return await server.listen(config.host, config.port)


async def serve_metrics(stack: AsyncExitStack, host: str, port: int, info: InfoHandlers) -> None:
    """Serve /metrics on a port of its own, too."""
    app = web.Application()
    app.router.add_get("/metrics", info.metrics)
    runner = web.AppRunner(app, access_log=None, logger=_web_logger(), shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    logger.info("metrics ready http=http://%s:%d/metrics", bracketed(host), runner.addresses[0][1])


class _WithoutParseErrors(logging.Filter):
    """Drops aiohttp's log records of malformed requests: their bytes may hold a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _web_logger() -> logging.Logger:
    """The logger of aiohttp's servers."""
    web_log = logging.getLogger("memserve.router.http.web")
    if not web_log.filters:
        web_log.addFilter(_WithoutParseErrors())
    return web_log

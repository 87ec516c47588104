"""aiohttp's connections, whose own errors have the form and the headers of all other errors.

aiohttp answers by itself a request that is not HTTP, has a head that is too large, or names no endpoint.
Knows no endpoints.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sized
from typing import Any

from aiohttp import web
from aiohttp.http import StreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from memserve.router.errors import failure
from memserve.router.http.cors import Cors
from memserve.router.http.exchange import json_response
from memserve.router.http.ingress import ClientLimits
from memserve.router.http.plain_head import MAX_HEADERS

LINGER_S = 2.0
"""Time for a refused client to read its answer before the connection is closed."""
_TOO_MANY = "Too many headers"


class WebConnection(web.RequestHandler):
    """See the module. Event loop thread only."""

    __slots__ = ("_cors", "_is_refused", "_received")

    def __init__(self, server: web.Server, cors: Cors, limits: ClientLimits) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            logger=web_logger(),
            keepalive_timeout=limits.keepalive_s,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=MAX_HEADERS,
        )
        self._cors = cors
        self._received = b""
        """What arrived last, while no request is answered: the head of a request that cannot be parsed."""
        self._is_refused = False

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if not self._is_refused:
            self._received = data
            super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that cannot be parsed, or whose handler failed; it ends the connection."""
        super().handle_error(request, status, exc, message)  # logs; raises if an answer has begun
        headers: dict[str, str] = {}
        if isinstance(exc, HttpProcessingError):
            self._is_refused = True
            status, message = _parse_error(exc)
            headers = self._cors.reply_to(self._received)
        failed = failure(status, message or "the router failed; see its log")
        response = json_response(failed.body(), status, headers)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer. A refused client has time to read it: a reset could discard it."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = _enveloped(request, resp)
        sent = await super().finish_response(request, resp, start_time)
        self._received = b""
        if self._is_refused and (transport := self.transport) is not None:
            if transport.can_write_eof():
                transport.write_eof()
            await asyncio.sleep(LINGER_S)  # is cancelled when the client leaves
        return sent


class WebConnections:
    """Makes the connections of one aiohttp server."""

    def __init__(self, server: web.Server, cors: Cors, limits: ClientLimits) -> None:
        self._server, self._cors, self._limits = server, cors, limits
        make_request = server.request_factory

        def with_own_writer(message, payload, protocol, writer, task):  # type: ignore[no-untyped-def]
            return make_request(message, payload, protocol, _ByteWriter(protocol, writer.loop), task)

        server.request_factory = with_own_writer

    @property
    def connections(self) -> Sized:
        """The open ones."""
        return self._server.connections

    def __call__(self) -> WebConnection:
        """A new connection."""
        return WebConnection(self._server, self._cors, self._limits)


class _ByteWriter(StreamWriter):
    """Sends bytes of headers as they came: aiohttp drops the bytes that are not UTF-8."""

    async def write_headers(self, status_line: str, headers: Any) -> None:
        """Begin an answer. Raises ValueError for a line break in a header."""
        await super().write_headers(status_line, headers)
        lines = [status_line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self._headers_buf = "\r\n".join(lines).encode(errors="surrogateescape")


def web_logger() -> logging.Logger:
    """The logger of aiohttp's servers."""
    web_log = logging.getLogger("memserve.router.http.web")
    if not web_log.filters:
        web_log.addFilter(_WithoutParseErrors())
    return web_log


class _WithoutParseErrors(logging.Filter):
    """Drops aiohttp's log records of malformed requests: their bytes may hold a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        kinds = HttpProcessingError | web.RequestPayloadError
        return not (record.exc_info and isinstance(record.exc_info[1], kinds))


def _parse_error(error: HttpProcessingError) -> tuple[int, str]:
    """Status and message, without bytes of the request: they may hold a key."""
    if isinstance(error, LineTooLong):
        return 431, "the request line or a header is too long; the longest is --max-header-bytes"
    if error.message.startswith(_TOO_MANY):
        return 431, f"the request has more than {MAX_HEADERS} headers"
    return 400, "the request is not valid HTTP"


def _enveloped(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    """aiohttp's own error (unknown path, wrong method) in the envelope of all others."""
    path = request.path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    failed = failure(error.status, f"{request.method} {path}: {error.reason}")
    allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return json_response(failed.body(), error.status, allow)

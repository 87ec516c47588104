"""Cross-origin resource sharing: web pages of some origins may call client endpoints, and read their errors.

Knows no endpoint but by the table. Source: the Fetch standard.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from memserve.router.http.endpoints import PERMISSIONS, Permission

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ORIGIN = re.compile(rb"\r\norigin:[ \t]*([^\r\n]*?)[ \t]*(?:\r|$)", re.IGNORECASE)


class Cors:
    """See the module."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins`: scheme, host and port of each; "*" is any."""
        self._any = "*" in origins
        self._origins = frozenset(origin.rstrip("/") for origin in origins)
        self._sole = next(iter(self._origins)) if len(self._origins) == 1 else None

    def __bool__(self) -> bool:
        """True if any origin is allowed."""
        return bool(self._origins)

    def reply(self, origin: str | None) -> dict[str, str]:
        """Headers of an answer to a page of this origin; none if the page may not read it."""
        if origin is None or not (self._any or origin in self._origins):
            return {}
        return {
            "Access-Control-Allow-Origin": "*" if self._any else origin,
            "Access-Control-Expose-Headers": "x-request-id, retry-after, www-authenticate",
            "Vary": "Origin",
        }

    def reply_to(self, received: bytes) -> dict[str, str]:
        """The same for a request that cannot be parsed; `received`: bytes of it.

        If they do not tell the origin, the answer is for the only one that is allowed.
        """
        found = _ORIGIN.search(received)
        return self.reply(self._sole if found is None else found[1].decode(errors="surrogateescape"))

    def add_to(self, app: web.Application) -> None:
        """Answer preflight requests, and add headers to all answers of `app` that pages may read."""
        app.middlewares.append(self._preflight())
        app.on_response_prepare.append(self._add_headers)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        if is_for_pages(request):
            response.headers.update(self.reply(request.headers.get("Origin")))

    def _preflight(self) -> Middleware:
        @web.middleware
        async def shared(request: web.Request, handler: Handler) -> web.StreamResponse:
            asked = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
            if not (asked and is_for_pages(request) and self.reply(request.headers.get("Origin"))):
                return await handler(request)
            allowed = {
                "Access-Control-Allow-Methods": "GET, POST, PUT",
                "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
                "Access-Control-Max-Age": "600",  # A browser may cache this answer so long.
            }
            return web.Response(status=204, headers=allowed)

        return shared


def is_for_pages(request: web.Request) -> bool:
    """True for the endpoints of any client, and for paths without an endpoint."""
    if isinstance(request.match_info.http_exception, web.HTTPNotFound):
        return True
    path = request.path
    template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
    return PERMISSIONS.get(template) in (Permission.OPEN, Permission.CLIENT)

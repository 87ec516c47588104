"""Which web pages may send requests: their origins, told to browsers. Pages for admins are not for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_AGE_S = 600


class Cors:
    """Cross-origin resource sharing. Source: the Fetch standard."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins`: scheme, host and port of each; "*" is any."""
        self._any = "*" in origins
        self._origins = frozenset(origin.rstrip("/") for origin in origins)

    def __bool__(self) -> bool:
        """Whether any page may."""
        return bool(self._origins)

    def reply(self, origin: str | None) -> dict[str, str]:
        """Headers of an answer to a page of this origin; none if it may not read it."""
        if origin is None or not (self._any or origin in self._origins):
            return {}
        return {
            "Access-Control-Allow-Origin": "*" if self._any else origin,
            "Access-Control-Expose-Headers": "x-request-id, retry-after",
            "Vary": "Origin",
        }

    def middleware(self, is_clients: Callable[[str], bool]) -> Middleware:
        """What an aiohttp application wants: answers the browser's question, and marks answers.

        `is_clients`: whether what is at a path is for clients, and not for admins alone.
        """

        @web.middleware
        async def shared(request: web.Request, handler: Handler) -> web.StreamResponse:
            reply = self.reply(request.headers.get("Origin"))
            if not reply or not is_clients(request.path):
                return await handler(request)
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                wanted = request.headers.get("Access-Control-Request-Headers", "")
                asked = {
                    "Access-Control-Allow-Methods": "GET, POST, PUT",
                    "Access-Control-Allow-Headers": wanted,
                    "Access-Control-Max-Age": str(MAX_AGE_S),
                }
                return web.Response(status=204, headers={**reply, **asked})
            response = await handler(request)
            if not response.prepared:
                response.headers.update(reply)
            return response

        return shared

"""Stands before every page: whose it is to see, whose to change. What is not listed here is an admin's.

Knows no page.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum, auto
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from memserve.core.errors import BadRequest
from memserve.core.hosts import is_loopback
from memserve.router.errors import Overloaded, failure_of
from memserve.router.http.handlers.generate import json_response
from memserve.router.http.ingress import Ingress
from memserve.router.request import Api

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PAGE_BODY_BYTES = 256 << 10
"""What pages other than those that generate take."""
READ_THEIR_OWN = frozenset({*Api, "/explain"})
"""Those that generate, and have bounds of their own."""
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="memserve"'}
"""Has a browser ask for a key: as the password, with any name."""


class Permission(Enum):
    """Whose a page is."""

    OPEN = auto()
    """Anybody's: is the router well, what does it count."""
    CLIENT = auto()
    """Of whoever may send requests."""
    SHARED = auto()
    """A client's, unless there are several: it reaches the requests of all."""
    ADMIN = auto()
    """It tells, or changes, how things are inside."""


LEVELS = {
    "/health": Permission.OPEN,
    "/liveness": Permission.OPEN,
    "/readiness": Permission.OPEN,
    "/metrics": Permission.OPEN,
    "/openapi.json": Permission.OPEN,
    "/generate": Permission.CLIENT,
    "/v1/chat/completions": Permission.CLIENT,
    "/v1/completions": Permission.CLIENT,
    "/v1/models": Permission.CLIENT,
    "/v1/models/{model}": Permission.CLIENT,
    "/model_info": Permission.CLIENT,
    "/get_model_info": Permission.CLIENT,
    "/server_info": Permission.CLIENT,
    "/get_server_info": Permission.CLIENT,
    "/explain": Permission.CLIENT,
    "/concate_and_append_request": Permission.CLIENT,
    "/abort_request": Permission.SHARED,
}
"""By path, as it is routed. `/server_info` and `/readiness` tell admins more."""
_CHANGES_WHEN_SEEN = {"/flush_cache"}


def is_clients(path: str) -> bool:
    """Whether what is asked for at this path, before it is routed, is for anybody but admins."""
    level = LEVELS.get("/v1/models/{model}" if path.startswith("/v1/models/") else path, Permission.ADMIN)
    return level in (Permission.OPEN, Permission.CLIENT)


class Guard:
    """The check, and the aiohttp middleware that does it."""

    def __init__(self, door: Ingress) -> None:
        self._door = door
        self._access = door.access

    def level_of(self, path: str) -> Permission:
        """Whose the page is that is routed by `path`."""
        level = LEVELS.get(path, Permission.ADMIN)
        if level is Permission.SHARED:
            return Permission.ADMIN if self._access.has_tenants else Permission.CLIENT
        return level

    def check(self, request: web.Request, path: str) -> None:
        """Raises BadRequest for who may not have the page that is routed by `path`."""
        authorization = request.headers.get("Authorization")
        level = self.level_of(path)
        if level is Permission.ADMIN:
            name = self._access.check_admin(authorization)
            changes = request.method not in ("GET", "HEAD") or path in _CHANGES_WHEN_SEEN
            self._check_origin(request, changes=changes)
            if changes:
                logger.info(
                    "change asked for method=%s path=%s admin=%s from=%s",
                    *(request.method, request.rel_url.raw_path, name, request.remote),
                )
        elif level is Permission.CLIENT and not self._is_admin(authorization):
            self._access.tenant_of(authorization)

    def middleware(self) -> Middleware:
        """What an aiohttp application wants."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource = request.match_info.route.resource
            if resource is None:  # there is no such page
                return await handler(request)
            try:
                self.check(request, resource.canonical)
                if not request.can_read_body or resource.canonical in READ_THEIR_OWN:
                    return await handler(request)
                async with self._body_read(request):
                    return await handler(request)
            except (BadRequest, Overloaded) as error:
                failed = failure_of(error)
                is_asked = failed.status == 401 and request.method == "GET"
                return json_response(
                    failed.body(), failed.status, _CHALLENGE if is_asked else failed.headers()
                )

        return guarded

    @asynccontextmanager
    async def _body_read(self, request: web.Request) -> AsyncIterator[None]:
        """A block in which the request has its body. Raises BadRequest (408), Overloaded."""
        num_bytes = PAGE_BODY_BYTES if request.content_length is None else request.content_length
        num_bytes = min(num_bytes, PAGE_BODY_BYTES)  # aiohttp refuses more
        if not self._door.budget.try_take(num_bytes):
            raise self._door.out_of_memory()
        try:
            try:
                async with asyncio.timeout(self._door.limits.stall_s):
                    await request.read()
            except TimeoutError as error:
                raise BadRequest("the body did not arrive in time", status=408) from error
            yield
        finally:
            self._door.budget.give(num_bytes)

    def _is_admin(self, authorization: str | None) -> bool:
        return self._access.knows_admins and self._access.is_admin(authorization)

    def _check_origin(self, request: web.Request, *, changes: bool) -> None:
        """Other sites' pages, in a browser that may come here, change nothing and see nothing."""
        site = request.headers.get("Sec-Fetch-Site", "none")
        if ("Origin" in request.headers and changes) or site not in ("none", "same-origin"):
            raise BadRequest("web pages cannot do this", status=403)
        # A name of an attacker's that points here is the same origin to a browser.
        if not self._access.knows_admins and not _is_own_name(request.host):
            raise BadRequest("without a key, write the router's address and not a name", status=403)


def _is_own_name(host: str) -> bool:
    """Whether a Host header is an address, or this machine's name for itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if is_loopback(name):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

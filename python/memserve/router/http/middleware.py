"""What every request to an aiohttp endpoint passes: permission and body.

Knows no endpoint but by the table.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from memserve.core.errors import BadRequest, MemServeError
from memserve.core.hosts import is_loopback
from memserve.router.errors import CHALLENGE, failure_of
from memserve.router.http.endpoints import CHANGES_BY_GET, PERMISSIONS, READS_BODY, Permission
from memserve.router.http.exchange import json_response
from memserve.router.http.ingress import Ingress

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SMALL_BODY_BYTES = 256 << 10
"""The largest body of an endpoint whose handler does not read it itself."""
_ASK_BROWSER = f'Basic realm="memserve", {CHALLENGE}'
"""Makes a browser ask for a key: as the password, with any user name."""


class Guard:
    """Checks the permission of each request, reads small bodies, and answers a handler's MemServeErrors."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress
        self._access = ingress.access

    def permission_of(self, path: str) -> Permission:
        """The permission that the endpoint routed by `path` needs now."""
        permission = PERMISSIONS.get(path, Permission.ADMIN)
        if permission is Permission.SHARED:
            return Permission.ADMIN if self._access.has_tenants else Permission.CLIENT
        return permission

    def check(self, request: web.Request, path: str) -> None:
        """Raises BadRequest (401 or 403) if the request may not use the endpoint routed by `path`."""
        authorization = request.headers.get("Authorization")
        permission = self.permission_of(path)
        if permission is Permission.ADMIN:
            name = self._access.check_admin(authorization)
            changes = request.method not in ("GET", "HEAD") or path in CHANGES_BY_GET
            self._check_origin(request, changes=changes)
            if changes:
                logger.info(
                    "change asked for method=%s path=%s admin=%s from=%s",
                    *(request.method, request.rel_url.raw_path, name, request.remote),
                )
        elif permission is Permission.CLIENT and not self._is_admin(authorization):
            self._access.authenticate(authorization)

    def middleware(self) -> Middleware:
        """The aiohttp middleware."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource = request.match_info.route.resource
            if resource is None:  # there is no such endpoint
                return await handler(request)
            try:
                self.check(request, resource.canonical)
                if not request.can_read_body or resource.canonical in READS_BODY:
                    return await handler(request)
                async with self._body_read(request):
                    return await handler(request)
            except MemServeError as error:
                failed = failure_of(error)
                headers = failed.headers()
                if failed.status == 401 and request.method == "GET":
                    headers["WWW-Authenticate"] = _ASK_BROWSER
                return json_response(failed.body(), failed.status, headers)

        return guarded

    @asynccontextmanager
    async def _body_read(self, request: web.Request) -> AsyncIterator[None]:
        """A block in which the request has its body. Raises BadRequest (408), Overloaded."""
        num_bytes = SMALL_BODY_BYTES if request.content_length is None else request.content_length
        num_bytes = min(num_bytes, SMALL_BODY_BYTES)  # aiohttp refuses more
        if not self._ingress.budget.try_take(num_bytes):
            raise self._ingress.out_of_memory()
        try:
            try:
                async with asyncio.timeout(self._ingress.limits.stall_s):
                    await request.read()
            except TimeoutError as error:
                raise BadRequest("the body did not arrive in time", status=408) from error
            except web.RequestPayloadError as error:
                raise BadRequest("the body is broken") from error
            yield
        finally:
            self._ingress.budget.give(num_bytes)

    def _is_admin(self, authorization: str | None) -> bool:
        return self._access.knows_admins and self._access.is_admin(authorization)

    def _check_origin(self, request: web.Request, *, changes: bool) -> None:
        """Web pages of other sites, in a browser that can reach the router, may change and see nothing."""
        site = request.headers.get("Sec-Fetch-Site", "none")
        if ("Origin" in request.headers and changes) or site not in ("none", "same-origin"):
            raise BadRequest("web pages cannot do this", status=403)
        # To a browser, an attacker's host name that resolves to this address is the same origin.
        if not self._access.knows_admins and not _is_own_name(request.host):
            raise BadRequest("without a key, write the router's address and not a name", status=403)


def _is_own_name(host: str) -> bool:
    """True if a Host header is an IP address, or a loopback name of this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if is_loopback(name):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

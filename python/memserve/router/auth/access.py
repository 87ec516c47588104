"""Which API key may do what: clients generate, admins see and change the cluster.

                           clients need                    admins need
    nothing configured     nothing                         nothing on loopback; off it, all is refused
    --api-key              that key                        that key, unless there is an admin key file
    --api-keys-file        one of its keys                 all is refused
    --admin-api-key-file   (as above)                      one of its keys

Knows no HTTP but the Authorization header.
"""

from __future__ import annotations

import base64
import binascii

from memserve.core.errors import BadRequest
from memserve.router.auth.keys import UNNAMED_ADMIN, KeyFile, Keys
from memserve.router.tenant import SOLE_TENANT, Tenant

ADMIN_FLAG = "--admin-api-key-file"
NEEDS_KEY = "an API key is needed: Authorization: Bearer KEY"
NEEDS_ADMIN_KEY = "an admin API key is needed: Authorization: Bearer KEY"


class Access:
    """Event loop thread only."""

    def __init__(
        self,
        *,
        tenants: KeyFile[Tenant] | None = None,
        api_key: str | None = None,
        admins: KeyFile[str] | None = None,
        is_exposed: bool = False,
    ) -> None:
        """`api_key` is the servers' key too; if there are `tenants`, it is the servers' key only.

        `is_exposed`: other machines can reach the router.
        """
        self._tenants = tenants
        self._single = Keys({api_key: SOLE_TENANT}) if api_key is not None and tenants is None else None
        self._admins = admins
        self._is_exposed = is_exposed
        self._upstream_key = None if api_key is None else f"Bearer {api_key}"
        self.has_tenants = tenants is not None
        """True if clients are told apart by their keys."""

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant by its Authorization header. Raises BadRequest (401) without a valid key."""
        keys = self._single if self._tenants is None else self._tenants.keys
        if keys is None:
            return SOLE_TENANT
        key = key_of(authorization)
        tenant = None if key is None else keys.owner(key)
        if tenant is None:
            raise BadRequest(NEEDS_KEY, status=401)
        return tenant

    def authenticate_as(self, authorization: str | None, name: str | None) -> Tenant:
        """The tenant whose request is explained: a client's own, or the tenant `name` for an admin.

        Raises BadRequest: 401 without a valid key, 400 if an admin gives no name.
        """
        if not (self.has_tenants and self.is_admin(authorization)):
            return self.authenticate(authorization)
        if not name:
            raise BadRequest("an admin has to name the tenant: x-memserve-tenant: TENANT")
        return Tenant(name)

    def is_admin(self, authorization: str | None) -> bool:
        """True if this Authorization header may use admin endpoints."""
        try:
            self.check_admin(authorization)
        except BadRequest:
            return False
        return True

    def check_admin(self, authorization: str | None) -> str:
        """The admin's name, or `UNNAMED_ADMIN`.

        Raises BadRequest: 401 if the key is not an admin key, 403 if no admin keys are configured (the
        message names the flag).
        """
        if self._admins is not None:
            key = key_of(authorization)
            name = None if key is None else self._admins.keys.owner(key)
            if name is None:
                raise BadRequest(NEEDS_ADMIN_KEY, status=401)
            return name
        if self._tenants is not None:
            message = f"off, as there are tenants and no admin keys: start the router with {ADMIN_FLAG}"
            raise BadRequest(message, status=403)
        if self._single is not None:
            self.authenticate(authorization)
        elif self._is_exposed:
            message = (
                f"off, as other machines can reach the router: start it with {ADMIN_FLAG}, "
                "or with --host 127.0.0.1"
            )
            raise BadRequest(message, status=403)
        return UNNAMED_ADMIN

    def upstream_authorization(self, authorization: str | None) -> str | None:
        """The Authorization header for servers: theirs, or the client's if it is no key of the router."""
        is_routers = self._tenants is not None or self._single is not None
        return self._upstream_key if is_routers else authorization

    @property
    def knows_admins(self) -> bool:
        """True if admins are identified by a key."""
        return self._admins is not None or self._single is not None

    def reload(self, *, is_forced: bool = False) -> None:
        """Read changed key files again; all of them if `is_forced`."""
        for file in (self._tenants, self._admins):
            if file is not None:
                file.reload(is_forced=is_forced)


def key_of(authorization: str | None) -> str | None:
    """The key in an Authorization header: a bearer token or a basic password; None if there is none."""
    kind, _, rest = (authorization or "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return None

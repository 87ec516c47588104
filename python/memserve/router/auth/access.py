"""Who may do what: clients ask for tokens, admins see and change the cluster.

                           clients need                    admins need
    nothing configured     nothing                         nothing on loopback; off it, all is off
    --api-key              that key                        that key, unless there is a file of others
    --api-keys-file        one of its keys                 nothing will do: all is off
    --admin-api-key-file   (as above)                      one of its keys

Knows no HTTP but the Authorization header.
"""

from __future__ import annotations

import base64
import binascii

from memserve.core.errors import BadRequest
from memserve.router.auth.keys import ANYBODY, SOMEBODY, KeyFile, Keys, Tenant

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
        """`api_key` is the servers' too; beside `tenants`, theirs alone.

        `is_exposed`: other machines can ask.
        """
        self._tenants = tenants
        self._single = Keys({api_key: ANYBODY}) if api_key is not None and tenants is None else None
        self._admins = admins
        self._is_exposed = is_exposed
        self._servers_own = None if api_key is None else f"Bearer {api_key}"
        self.has_tenants = tenants is not None
        """Whether clients are kept apart."""

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Whose request has this Authorization header. Raises BadRequest (401) if nobody's."""
        keys = self._single if self._tenants is None else self._tenants.keys
        if keys is None:
            return ANYBODY
        key = key_of(authorization)
        tenant = None if key is None else keys.owner(key)
        if tenant is None:
            raise BadRequest(NEEDS_KEY, status=401)
        return tenant

    def explained_as(self, authorization: str | None, name: str | None) -> Tenant:
        """Whose request is looked at: admins say so by `name`. Raises BadRequest."""
        if not (self.has_tenants and self.is_admin(authorization)):
            return self.tenant_of(authorization)
        if not name:
            raise BadRequest("an admin says whose request it is: x-memserve-tenant: TENANT")
        return Tenant(name)

    def is_admin(self, authorization: str | None) -> bool:
        """Whether whoever sent this Authorization header is one."""
        try:
            self.check_admin(authorization)
        except BadRequest:
            return False
        return True

    def check_admin(self, authorization: str | None) -> str:
        """The admin's name, as far as it is known.

        Raises BadRequest for who is none: 401; 403 where nobody is, with the flag that would change it.
        """
        if self._admins is not None:
            key = key_of(authorization)
            name = None if key is None else self._admins.keys.owner(key)
            if name is None:
                raise BadRequest(NEEDS_ADMIN_KEY, status=401)
            return name
        if self._tenants is not None:
            message = f"off, as there are tenants and no admin: start the router with {ADMIN_FLAG}"
            raise BadRequest(message, status=403)
        if self._single is not None:
            self.tenant_of(authorization)
        elif self._is_exposed:
            message = (
                f"off, as the router can be reached from other machines: start it with {ADMIN_FLAG}, "
                "or with --host 127.0.0.1"
            )
            raise BadRequest(message, status=403)
        return SOMEBODY

    def for_servers(self, authorization: str | None) -> str | None:
        """What servers get for this Authorization header of a request: no key that is for the router."""
        is_ours = self._tenants is not None or self._single is not None
        return self._servers_own if is_ours else authorization

    @property
    def knows_admins(self) -> bool:
        """Whether an admin is known by a key."""
        return self._admins is not None or self._single is not None

    def follow(self, *, is_asked: bool = False) -> None:
        """Read key files again that have changed; all of them if somebody asks."""
        for file in (self._tenants, self._admins):
            if file is not None:
                file.follow(is_asked=is_asked)


def key_of(authorization: str | None) -> str | None:
    """The key in an Authorization header, as a bearer or as the password that a browser asks for; or None."""
    kind, _, rest = (authorization or "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return None

"""Who asks, by API key; and what keeps tenants from each other's cached blocks.

Every request gets a salt that its tenant's name goes into, so equal prompts of two tenants have different
keys everywhere: in radix caches, pools and the prompt tree. A salt of the client's own divides its tenant's
cache further, and reaches nobody else's. Knows no instances.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from pathlib import Path

from msgspec import structs

from memserve.core.errors import BadRequest, ConfigError
from memserve.core.secret_file import read_secret_file
from memserve.router.serving.api import Call


class Tenants:
    """API keys and whose they are."""

    def __init__(self, tenants: dict[str, str]) -> None:
        """`tenants` by API key."""
        self._tenants = {sha256(key.encode()).digest(): tenant for key, tenant in tenants.items()}

    @classmethod
    def read(cls, path: Path) -> Tenants:
        """From lines `KEY TENANT`; empty ones and those that begin with # say nothing.

        Raises ConfigError if it cannot be read, others may read it, or a line is something else.
        """
        try:
            lines = read_secret_file(path, "API key").decode().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the API key file {path} is no text: {error}") from error
        tenants: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] in tenants:
                raise ConfigError(f"{path}, line {number}: write KEY TENANT, each key once")
            tenants[words[0]] = words[1]
        if not tenants:
            raise ConfigError(f"{path} has no API key: write lines of KEY TENANT")
        return cls(tenants)

    def tenant_of(self, authorization: str | None) -> str:
        """Whose request has this Authorization header. Raises BadRequest (401) if nobody's."""
        kind, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode()).digest()
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest) and kind.lower() == "bearer":
                return tenant
        raise BadRequest("an API key is needed: Authorization: Bearer KEY", status=401)


def salted(call: Call, tenant: str) -> Call:
    """`call` as the servers should get it: in its tenant's part of the cache, without the API key."""
    own = call.body.get("cache_salt")
    salt = [_salt(tenant, one) for one in own] if isinstance(own, list) else _salt(tenant, own)
    return structs.replace(call, body={**call.body, "cache_salt": salt}, authorization=None)


def _salt(tenant: str, own: object) -> str:
    """Of a client that gives none, or something else than a text, it is its tenant's."""
    parts = ("memserve tenant", tenant, own if isinstance(own, str) else "")
    return sha256(
        b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    ).hexdigest()

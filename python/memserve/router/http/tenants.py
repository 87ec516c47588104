"""What keeps tenants from each other's cached blocks, and from each other's requests.

Every request gets a salt that its tenant's name goes into, so equal prompts of two tenants have different
keys everywhere: in radix caches, pools and the prompt tree. A salt of the client's own divides its tenant's
cache further, and reaches nobody else's. Knows no keys and no instances.
"""

from __future__ import annotations

from hashlib import sha256

from msgspec import structs

from memserve.router.auth.keys import ANYBODY, Tenant
from memserve.router.request import GenerationRequest


def salted(call: GenerationRequest, tenant: Tenant) -> GenerationRequest:
    """`call` as the servers should get it: in its tenant's part of the cache."""
    if tenant is ANYBODY:
        return call
    own = call.body.get("cache_salt")
    salt = [_salt(tenant, one) for one in own] if isinstance(own, list) else _salt(tenant, own)
    return structs.replace(call, body={**call.body, "cache_salt": salt}, is_apart=True)


def _salt(tenant: Tenant, own: object) -> str:
    """Of a client that gives none, or something else than a text, it is its tenant's."""
    parts = ("memserve tenant", tenant.name, own if isinstance(own, str) else "")
    return sha256(
        b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    ).hexdigest()

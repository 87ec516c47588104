"""Names for the things that cross process borders. Knows nothing of what they identify."""

from __future__ import annotations

import secrets
from typing import NewType

InstanceId = NewType("InstanceId", str)
"""One server, unique in the cluster; stays the same over restarts if the operator names it."""

Epoch = NewType("Epoch", int)
"""One process's life: 63 random bits, new at every start. Never 0."""


def new_epoch() -> Epoch:
    """A fresh epoch for this process."""
    return Epoch(secrets.randbits(63) | 1)


def pool_name(memory: InstanceId, layout: str) -> InstanceId:
    """The prompt tree's name for the pool that a memory instance keeps for one KV layout."""
    return InstanceId(f"{memory}#{layout[:16]}")


def server_of(name: InstanceId) -> InstanceId:
    """The server that owns the cache `name`. Data-parallel ranks append /dpN to their server's name."""
    server, _, rank = name.rpartition("/dp")
    return InstanceId(server) if server and rank.isdecimal() else name

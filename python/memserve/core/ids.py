"""Identifiers that cross process borders."""

from __future__ import annotations

import secrets
from typing import NewType

InstanceId = NewType("InstanceId", str)
"""The name of one server, unique in the cluster. Survives restarts if the operator sets it."""

Epoch = NewType("Epoch", int)
"""Identifies one run of one process: 63 random bits, new at every start. Never 0."""


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

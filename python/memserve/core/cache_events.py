"""The events by which a pool reports the changes of its index, exactly and with gaps noticed.

    pool      Stored 1, Removed 2, Stored 3, ...              one sequence over all tiers
    follower  Snapshot(sequence=2), then 3, 4, ...            older ones are in the snapshot

Knows no sockets and no slots. Source: SGLang's KV events; the sequence over tiers is ours.
"""

from __future__ import annotations

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey


class Stored(msgspec.Struct, frozen=True, tag=True):
    """A chain of blocks is cached now. keys[0] follows `parent`; without a parent it begins a prompt."""

    sequence: int
    tier: Tier
    parent: BlockKey | None
    keys: tuple[BlockKey, ...]


class Removed(msgspec.Struct, frozen=True, tag=True):
    """Blocks are no longer cached; children before their parents."""

    sequence: int
    tier: Tier
    keys: tuple[BlockKey, ...]


CacheEvent = Stored | Removed


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """All blocks cached after event `sequence`: chains in an order in which each parent comes first."""

    sequence: int
    chains: tuple[Stored, ...]

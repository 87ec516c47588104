"""Results of the pool's verbs. Immutable values, which do not change the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey


@dataclass(frozen=True, slots=True)
class Inserted:
    """What `insert` did with each block. The three parts are the given addresses, in order."""

    new: Sequence[BlockAddr]
    """Blocks that the cache owns now."""
    duplicates: Sequence[BlockAddr]
    """Blocks whose keys were cached before: still the caller's, to free or use."""
    orphans: Sequence[BlockAddr]
    """Blocks whose parent is not cached, so that no match would find them: still the caller's."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of some keys, as of one moment: `acquire` it before relying on it."""

    keys: Sequence[BlockKey]
    """The cached keys."""
    addrs: Sequence[BlockAddr]
    """addrs[i] holds keys[i]; an address tells its tier."""
    num_wanted: int
    """Number of keys that the match asked for."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks promised to a writer. Ends exactly once: committed, cancelled, or settled after quarantine."""

    reservation_id: int
    addrs: Sequence[BlockAddr]


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Numbers of one tier of a pool at one moment; counters run from the start of the pool."""

    total: int
    """Usable slots: see `MemPool.resize`."""
    free: int
    private: int
    cached: int
    reserved: int
    quarantined: int
    """The five states; they add up to `total`."""
    evictable: int
    leases: int
    reservations: int
    """Open ones, the quarantined ones included."""
    hits: int
    misses: int
    """Of the blocks that a match asked for: those that `acquire` found in this tier (hits), and those that it
    found neither here nor in a nearer tier."""
    evictions: int
    corruptions: int
    """Blocks that failed their checksum."""
    bytes_sealed: int
    bytes_verified: int

"""What the pool's verbs answer with. Values only: nothing here changes, or changes the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey


@dataclass(frozen=True, slots=True)
class Inserted:
    """What `insert` did with each block: the three are the addresses it was given, in order."""

    new: Sequence[BlockAddr]
    """The cache's now."""
    duplicates: Sequence[BlockAddr]
    """Their keys are cached already: still the caller's, to free or use."""
    orphans: Sequence[BlockAddr]
    """What comes before them is not cached, so nobody would find them: still the caller's."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of some keys, as of a moment ago: `acquire` it to rely on it."""

    keys: Sequence[BlockKey]
    """Those that are cached."""
    addrs: Sequence[BlockAddr]
    """addrs[i] holds keys[i]; an address tells its tier."""
    num_wanted: int
    """Keys that were asked for."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots promised to a writer. Ends exactly once: committed, cancelled, or settled after quarantine."""

    reservation_id: int
    addrs: Sequence[BlockAddr]


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One moment of one tier of a pool; the counters run from its start."""

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
    """Open ones, the quarantined included."""
    hits: int
    misses: int
    """Blocks that `acquire` found in this tier; did not find here or nearer, of those the match asked for."""
    evictions: int
    corruptions: int
    """Blocks whose checksum did not hold."""
    bytes_sealed: int
    bytes_verified: int

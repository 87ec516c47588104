"""One tier of a pool: the blocks of one arena, their owners, index and checksums.

Knows no other tier, no leases and no reservations. Any thread; the lock is the pool's, shared by all
tiers and held for metadata only, never while bytes are read or written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import cast

import numpy as np
from xxhash import xxh3_64_intdigest

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError
from memserve.core.kv_layout import KVLayout
from memserve.mempool.allocator import CACHED, FREE, PRIVATE, QUARANTINED, RESERVED, Slots
from memserve.mempool.arena import Arena
from memserve.mempool.cache import BlockCache
from memserve.mempool.index import CachedNode
from memserve.mempool.records import Inserted, PoolStats

logger = logging.getLogger(__name__)

_MOVE_BLOCKS = 256
"""Blocks that `resize` moves or evicts between two checks of their leases."""


class Checksum:
    """The checksum function of one layout, which a block carries from leaving HBM until it is back.

    xxh3 (64 bits) over the block's bytes, seeded with the layout's digest: a block of another model, shape
    or precision fails it like a flipped bit does. It detects broken memory, stray writes and bugs, not an
    attacker. Pure; any thread.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._seed = int.from_bytes(layout.digest[:8], "little")

    def of(self, block: memoryview | bytes) -> int:
        """64 bits, unsigned, of a block's bytes."""
        return xxh3_64_intdigest(block, self._seed)


class TierPool:
    """Slots of `arena`, at addresses from `first` on. See MemPool for the contracts of its verbs."""

    def __init__(
        self,
        arena: Arena,
        first: BlockAddr,
        cache: BlockCache,
        checksum: Checksum,
        lock: threading.Lock,
    ) -> None:
        """`cache` covers the slots of `arena`."""
        self.arena = arena
        self.first = first
        self.cache = cache
        self._checksum = checksum
        self.lock = lock
        self.sums = np.zeros(arena.max_slots, np.uint64)
        """Checksums of CACHED and of sealed slots."""
        self._sealed = np.zeros(arena.max_slots, bool)  # Of PRIVATE slots: whether the bytes are complete.
        self._resizing = threading.Lock()
        self.hits = self.misses = self.corruptions = 0
        self.bytes_sealed = self.bytes_verified = 0

    def addrs(self, slots: Slots) -> list[BlockAddr]:
        return cast("list[BlockAddr]", (slots + self.first).tolist())

    def slots(self, addrs: Sequence[BlockAddr]) -> Slots:
        """Does not check the addresses: a foreign one gives a slot that does not exist."""
        return np.array(addrs, np.int64) - self.first

    def holds(self, addr: BlockAddr) -> bool:
        return 0 <= addr - self.first < self.arena.max_slots

    def stats(self, leases: int, reservations: int) -> PoolStats:
        """The caller holds the lock, and passes the numbers that it counts itself."""
        free, private, cached, reserved, quarantined = states = [
            self.cache.allocator.count(state) for state in (FREE, PRIVATE, CACHED, RESERVED, QUARANTINED)
        ]
        return PoolStats(
            total=sum(states),
            free=free,
            private=private,
            cached=cached,
            reserved=reserved,
            quarantined=quarantined,
            evictable=self.cache.index.num_evictable,
            leases=leases,
            reservations=reservations,
            hits=self.hits,
            misses=self.misses,
            evictions=self.cache.evictions,
            corruptions=self.corruptions,
            bytes_sealed=self.bytes_sealed,
            bytes_verified=self.bytes_verified,
        )

    def find(self, keys: Sequence[BlockKey], start: int) -> tuple[list[BlockAddr], CachedNode | None]:
        """Addresses of the cached part of keys[start:], and the node of its last block; none if a key before
        `start` is not in this tier. The caller holds the lock.
        """
        slots, last = self.cache.index.locate(keys, start)
        first = self.first
        return cast("list[BlockAddr]", [first + slot for slot in slots]), last

    # ---- private blocks

    def alloc(self, num_blocks: int) -> list[BlockAddr]:
        with self.lock:
            return self.addrs(self.cache.take(num_blocks, PRIVATE))

    def free(self, addrs: Sequence[BlockAddr]) -> None:
        slots = self.slots(addrs)
        with self.lock:
            self.cache.allocator.move(slots, PRIVATE, FREE)
            self._sealed[slots] = False

    def seal(self, addrs: Sequence[BlockAddr]) -> list[int]:
        slots = self.slots(addrs)
        with self.lock:
            self.cache.allocator.require(slots, PRIVATE)
        sums = [self._checksum.of(self.arena.block(slot)) for slot in slots.tolist()]
        with self.lock:
            self.cache.allocator.require(slots, PRIVATE)
            self.sums[slots] = sums
            self._sealed[slots] = True
            self.bytes_sealed += len(slots) * self.arena.block_bytes
        return sums

    def insert(
        self, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], parent: BlockKey | None
    ) -> Inserted:
        if len(keys) != len(addrs):
            raise BlockStateError(f"{len(keys)} keys for {len(addrs)} blocks")
        slots = self.slots(addrs)
        with self.lock:
            self.cache.allocator.require(slots, PRIVATE)
            if not self._sealed[slots].all():
                raise BlockStateError("a block is not sealed")
            try:
                known = len(keys) - self.cache.publish(keys, slots, parent)
            except KeyError:
                return Inserted((), (), addrs)
            self._sealed[slots[known:]] = False
        return Inserted(addrs[known:], addrs[:known], ())

    # ---- checksums

    def checksums(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Checksums of leased blocks."""
        return list(self.sums[self.slots(addrs)].tolist())

    def verify(self, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr]) -> int:
        """How many leased blocks, from the front, hold what was sealed; the first corrupt one is dropped with
        all blocks after it."""
        good = 0
        slots = self.slots(addrs)
        for slot, expected in zip(slots.tolist(), self.sums[slots].tolist(), strict=True):
            if self._checksum.of(self.arena.block(slot)) != expected:
                self.mark_corrupt(keys[good], slot)
                break
            good += 1
        with self.lock:
            self.bytes_verified += good * self.arena.block_bytes
        return good

    def mark_corrupt(self, key: BlockKey, slot: int) -> None:
        """Drop the corrupt block at `slot`, and all blocks after it, from the index."""
        with self.lock:
            node = self.cache.index.at(slot)
            dropped = self.cache.drop(node) if node is not None and node.key == key else 0
            self.corruptions += dropped > 0
        logger.error("block corrupt key=%s slot=%d dropped=%d", key.hex()[:16], slot, dropped)

    # ---- size

    def resize(self, num_slots: int) -> int:
        """See MemPool. One at a time: a second call waits for the first."""
        with self._resizing:
            if num_slots >= self.arena.num_slots:
                self.arena.resize(num_slots)
                with self.lock:
                    self.cache.allocator.set_limit(num_slots)
                return num_slots
            self.arena.check_size(num_slots)
            self._vacate(num_slots)
            with self.lock:
                reached = max(num_slots, self.cache.allocator.end)
                self.cache.allocator.set_limit(reached)
            self.arena.resize(reached)
            return reached

    def _vacate(self, limit: int) -> None:
        """Move or evict the unleased cached blocks in slots from `limit` on."""
        cache = self.cache
        with self.lock:
            cache.allocator.set_limit(limit)
        while True:
            with self.lock:
                sources = cache.movable(limit)
                lacking = len(sources) - cache.allocator.count(FREE)
                if lacking > 0:
                    cache.evict(min(lacking, _MOVE_BLOCKS))
                    continue
                sources = sources[:_MOVE_BLOCKS]
                nodes = list(map(cache.index.at, sources.tolist()))
                targets = cache.allocator.take(len(sources), PRIVATE)
            # If a block leaves its slot meanwhile, or is leased there, its copy is dropped.
            self._copy(sources, targets)
            with self.lock:
                if not self._relocate(nodes, sources, targets):
                    return

    def _copy(self, sources: Slots, targets: Slots) -> None:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.arena.block(target)[:] = self.arena.block(source)

    def _relocate(self, nodes: Sequence[CachedNode | None], sources: Slots, targets: Slots) -> int:
        """Move the index entries of blocks that are still in their old slots, unleased; returns how many."""
        cache = self.cache
        there = [cache.index.at(slot) is node for slot, node in zip(sources.tolist(), nodes, strict=True)]
        moves = np.array(there, bool) & ~cache.index.are_pinned(sources)
        for source, target in zip(sources[moves].tolist(), targets[moves].tolist(), strict=True):
            cache.index.relocate(source, target)
        self.sums[targets[moves]] = self.sums[sources[moves]]
        cache.allocator.move(sources[moves], CACHED, FREE)
        cache.allocator.move(targets[moves], PRIVATE, CACHED)
        cache.allocator.move(targets[~moves], PRIVATE, FREE)
        return int(moves.sum())

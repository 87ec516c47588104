"""MemPool: the paper's verbs on one instance's DRAM.

    write   alloc_mem -> fill block(addr) -> seal -> insert -> free_mem what was not new
    read    acquire(match(keys)) -> verify -> copy block(addr) -> release
    receive reserve -> (a peer writes) -> commit -> seal -> insert

Nothing is found before its bytes are complete and summed, nothing is overwritten while somebody
reads it, and what fails its checksum is a miss. Knows no peers, no HBM and no SGLang.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Sequence

import numpy as np

from memserve.core.block_addr import BlockAddr, Tier, first_addr
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Snapshot
from memserve.core.errors import BlockStateError, ConfigError
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.allocator import FREE, PRIVATE, QUARANTINED, RESERVED, Slots, SlotState
from memserve.mempool.arena import Arena
from memserve.mempool.cache import BlockCache
from memserve.mempool.events import snapshot
from memserve.mempool.eviction import Ordering, lru
from memserve.mempool.integrity import Checksum
from memserve.mempool.lease import Lease
from memserve.mempool.records import Inserted, Match, PoolStats, Reservation
from memserve.mempool.reservations import Reservations

logger = logging.getLogger(__name__)


class MemPool:
    """Blocks of one layout in one arena. Any thread may call anything; verbs on metadata take a lock.

    The lock is held for about a microsecond per block that a call concerns, never while bytes move.
    The arena is the caller's to open, and to close once nobody uses the pool.
    """

    def __init__(self, layout: KVLayout, arena: Arena, epoch: Epoch, ordering: Ordering = lru) -> None:
        """Raises ConfigError if the arena's blocks are not of the layout's size."""
        if arena.block_bytes != layout.block_bytes:
            raise ConfigError(f"blocks of {layout.block_bytes} bytes, slots of {arena.block_bytes}")
        self.layout = layout
        self.arena = arena
        self._first = first_addr(epoch, Tier.DRAM)
        self._checksum = Checksum(layout)
        self._lock = threading.Lock()
        self._cache = BlockCache(arena.num_slots, Tier.DRAM, ordering)
        self._reservations = Reservations()
        self._leases: set[Lease] = set()
        self._sums = array("Q", bytes(8 * arena.num_slots))
        self._sealed: dict[int, int] = {}  # PRIVATE slots whose bytes are complete, and their checksums
        self._hits = self._misses = self._corruptions = 0
        self._bytes_sealed = self._bytes_verified = 0

    # ---- memory

    def alloc_mem(self, num_blocks: int) -> list[BlockAddr]:
        """That many blocks of DRAM, PRIVATE to the caller, their bytes undefined. All or nothing.

        Evicts unleased leaves if there are too few free ones. Raises OutOfBlocks, changing nothing.
        Source: MemServe, memory API (alloc_mem).
        """
        with self._lock:
            return self._addrs(self._cache.take(num_blocks, PRIVATE))

    def free_mem(self, addrs: Sequence[BlockAddr]) -> None:
        """Give PRIVATE blocks back.

        Raises BlockStateError, changing nothing, for a block that is free, cached, foreign or named twice.
        Source: MemServe, memory API (free_mem).
        """
        slots = self._slots(addrs)
        with self._lock:
            self._cache.allocator.move(slots, PRIVATE, FREE)
            if self._sealed:
                for slot in slots.tolist():
                    self._sealed.pop(slot, None)

    def block(self, addr: BlockAddr) -> memoryview:
        """The bytes of a block. Write only to your own (PRIVATE), read only what you lease.

        Raises BlockStateError if the address is not of this pool.
        """
        try:
            return self.arena.block(addr - self._first)
        except IndexError:
            raise BlockStateError("a block of another pool") from None

    def slots(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Where the blocks are in `arena`, for copies of many at once. Not checked."""
        return list(self._slots(addrs).tolist())

    def seal(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Declare PRIVATE blocks fully written; returns their checksums. They may not be written again.

        Reads the bytes, outside the lock. Raises BlockStateError, changing nothing, if one is not PRIVATE.
        """
        slots = self._slots(addrs)
        with self._lock:
            self._cache.allocator.require(slots, PRIVATE)
        sums = [self._checksum.of(self.arena.block(slot)) for slot in slots.tolist()]
        with self._lock:
            self._cache.allocator.require(slots, PRIVATE)
            self._sealed.update(zip(slots.tolist(), sums, strict=True))
            self._bytes_sealed += len(slots) * self.layout.block_bytes
        return sums

    # ---- index

    def insert(
        self, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], parent: BlockKey | None = None
    ) -> Inserted:
        """Index the blocks at `addrs` under `keys`, giving their slots to the cache.

        addrs[i] holds the block keys[i]: PRIVATE and sealed. The keys chain; keys[0] comes after
        `parent`, or begins a prompt. What is not taken (see Inserted) stays the caller's to free.
        Raises BlockStateError, changing nothing, if a block is not PRIVATE, not sealed or named twice.
        Source: MemServe, index API (insert); the rules for duplicates and orphans are ours.
        """
        if len(keys) != len(addrs):
            raise BlockStateError(f"{len(keys)} keys for {len(addrs)} blocks")
        slots = self._slots(addrs)
        with self._lock:
            self._cache.allocator.require(slots, PRIVATE)
            if not all(map(self._sealed.__contains__, slots.tolist())):
                raise BlockStateError("a block is not sealed")
            try:
                known = len(keys) - self._cache.publish(keys, slots, parent)
            except KeyError:
                return Inserted((), (), addrs)
            for slot in slots[known:].tolist():
                self._sums[slot] = self._sealed.pop(slot)
        return Inserted(addrs[known:], addrs[:known], ())

    def num_cached(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are cached. Pure; O(log n), for an engine's scheduler."""
        with self._lock:
            return self._cache.index.tree.depth(keys)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """The longest cached prefix of a chain of keys, and where each block is. Pure, uncounted.

        keys[0] need not begin a prompt. Source: MemServe, index API (match).
        """
        with self._lock:
            found = self._cache.index.tree.match(keys)
        first = self._first
        addrs = [BlockAddr(first + node.payload) for node in found]
        return Match(keys[: len(found)], addrs, len(keys))

    def delete(self, keys: Sequence[BlockKey]) -> int:
        """Drop the end of a cached chain, up to a block that is leased or that others come after.

        Returns how many blocks that were. Source: MemServe, index API (delete).
        """
        with self._lock:
            return self._cache.delete(keys)

    def clear(self) -> int:
        """Drop everything that is cached, leased or not: after this nothing old is ever found.

        Leased blocks are quarantined until their last lease ends. Returns how many blocks were dropped.
        """
        with self._lock:
            return sum(map(self._cache.drop, self._cache.index.roots()))

    # ---- leases

    def acquire(self, match: Match) -> Lease:
        """Keep the matched blocks, and all before them, in their place until `release`.

        What was evicted since the match is not in the lease, so look at its length. Counts hits and
        misses against all keys that the match asked for, hence acquire an empty match, too.
        """
        with self._lock:
            found = self._cache.index.tree.match(match.keys)
            if found:
                self._cache.index.pin(found[-1])
            self._hits += len(found)
            self._misses += match.num_wanted - len(found)
            addrs = [BlockAddr(self._first + node.payload) for node in found]
            lease = Lease(match.keys[: len(found)], addrs, found[-1] if found else None, self.release)
            self._leases.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease. Raises BlockStateError, changing nothing, if it has ended or is another pool's."""
        with self._lock:
            if lease not in self._leases:
                raise BlockStateError("a lease that has ended, or is another pool's")
            self._leases.remove(lease)
            if lease.node is not None:
                self._cache.unpin(lease.node)

    def verify(self, lease: Lease) -> int:
        """How many of the leased blocks, from the front, hold what was sealed. The lease goes on.

        Reads the bytes, outside the lock. The first block that does not is counted, logged, and
        dropped from the index with all that come after it: those are misses from now on.
        """
        good = 0
        for addr in lease.addrs:
            slot = addr - self._first
            if self._checksum.of(self.arena.block(slot)) != self._sums[slot]:
                self._condemn(lease.keys[good], slot)
                break
            good += 1
        with self._lock:
            self._bytes_verified += good * self.layout.block_bytes
        return good

    def checksums(self, lease: Lease) -> list[int]:
        """What the leased blocks summed to when they were sealed, for whoever copies them elsewhere."""
        return [self._sums[addr - self._first] for addr in lease.addrs]

    # ---- reservations: what peers write to

    def reserve(self, num_blocks: int) -> Reservation:
        """Promise blocks to a writer elsewhere. Evicts and raises as `alloc_mem`."""
        with self._lock:
            slots = self._cache.take(num_blocks, RESERVED)
            return Reservation(self._reservations.begin(slots), self._addrs(slots))

    def commit(self, reservation: Reservation) -> list[BlockAddr]:
        """All bytes have landed: the blocks are the caller's, PRIVATE, to seal and insert.

        Raises BlockStateError, changing nothing, if the reservation has ended or is quarantined.
        """
        with self._lock:
            slots = self._reservations.end(reservation.reservation_id)
            self._cache.allocator.move(slots, RESERVED, PRIVATE)
            return self._addrs(slots)

    def cancel(self, reservation: Reservation) -> None:
        """Nobody has written, nobody will: the blocks are free. Raises as `commit`."""
        with self._lock:
            self._cache.allocator.move(self._reservations.end(reservation.reservation_id), RESERVED, FREE)

    def quarantine(self, reservation: Reservation) -> None:
        """The writer may still write: keep the blocks from everybody until `settle`. Raises as `commit`."""
        with self._lock:
            slots = self._reservations.quarantine(reservation.reservation_id)
            self._cache.allocator.move(slots, RESERVED, QUARANTINED)

    def settle(self, reservation: Reservation) -> None:
        """The writer has acknowledged, is fenced or is dead: a quarantined reservation's blocks are free.

        Raises BlockStateError, changing nothing, if it is not quarantined.
        """
        with self._lock:
            slots = self._reservations.settle(reservation.reservation_id)
            self._cache.allocator.move(slots, QUARANTINED, FREE)

    # ---- for those who watch

    def take_events(self) -> list[CacheEvent]:
        """What changed in the index since the last call, numbered; for one publisher."""
        with self._lock:
            return self._cache.events.take()

    def snapshot(self) -> Snapshot:
        """All that is cached, for a follower that joins late. One copy of the list of blocks is locked."""
        with self._lock:
            sequence, nodes = self._cache.events.sequence(), self._cache.index.tree.nodes()
        return snapshot(sequence, Tier.DRAM, nodes)

    def stats(self) -> PoolStats:
        """All numbers of one moment."""
        with self._lock:
            free, private, cached, reserved, quarantined = map(self._cache.allocator.count, SlotState)
            return PoolStats(
                total=self.arena.num_slots,
                free=free,
                private=private,
                cached=cached,
                reserved=reserved,
                quarantined=quarantined,
                evictable=self._cache.index.num_evictable,
                leases=len(self._leases),
                reservations=len(self._reservations),
                hits=self._hits,
                misses=self._misses,
                evictions=self._cache.evictions,
                corruptions=self._corruptions,
                bytes_sealed=self._bytes_sealed,
                bytes_verified=self._bytes_verified,
            )

    def _addrs(self, slots: Slots) -> list[BlockAddr]:
        return list((slots + self._first).tolist())

    def _slots(self, addrs: Sequence[BlockAddr]) -> Slots:
        return np.array(addrs, np.int64) - self._first

    def _condemn(self, key: BlockKey, slot: int) -> None:
        """The block at `slot` is corrupt: nobody is to find it again."""
        with self._lock:
            node = self._cache.index.tree.get(key)
            dropped = self._cache.drop(node) if node is not None and node.payload == slot else 0
            if dropped:
                self._corruptions += 1
        logger.error("block corrupt key=%s slot=%d dropped=%d", key.hex()[:16], slot, dropped)

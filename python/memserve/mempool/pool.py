"""MemPool: the paper's verbs on one instance's blocks, in DRAM and, where the pool owns it, HBM.

    write   alloc_mem -> fill block(addr) -> seal -> insert -> free_mem what was not new
    read    acquire(match(keys)) -> verify -> copy block(addr) -> release
    receive reserve -> (a peer writes) -> commit -> seal -> insert
    swap    swap_out: HBM -> DRAM, whoever goes first      swap_in: DRAM -> HBM, who is named

Nothing is found before its bytes are complete and summed, nothing is overwritten while somebody
reads it, and what fails its checksum is a miss. Knows no peers and no SGLang: inside an engine, HBM
is SGLang's, and the pool has the DRAM tier alone; of HBM it only passes on what it is told.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from memserve.core.block_addr import BlockAddr, Tier, first_addr
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Snapshot
from memserve.core.errors import BlockStateError, ConfigError
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.cache import BlockCache
from memserve.mempool.checksums import Checksum
from memserve.mempool.events import CachedNodes, EventLog, snapshot
from memserve.mempool.eviction import EvictionPolicy, lru
from memserve.mempool.external_tier import ExternalTier
from memserve.mempool.lease import Lease
from memserve.mempool.leases import Leases
from memserve.mempool.records import Inserted, Match, PoolStats, Reservation
from memserve.mempool.reservations import WriteReservations
from memserve.mempool.swap import swap_in, swap_out
from memserve.mempool.tier_pool import TierPool


class MemPool:
    """Blocks of one layout in one or two arenas. Any thread may call anything; metadata has one lock.

    The lock is held for about a microsecond per block that a call concerns, never while bytes move.
    Each tier is prefix-closed by itself, and a block may be in both.
    The arenas are the caller's to open, and to close once nobody uses the pool.
    """

    def __init__(
        self,
        layout: KVLayout,
        arena: Arena,
        epoch: Epoch,
        ordering: EvictionPolicy = lru,
        *,
        hbm: Arena | None = None,
    ) -> None:
        """`arena` is the DRAM. Raises ConfigError if an arena's blocks are not of the layout's size."""
        self.layout = layout
        self.arena = arena
        self._lock = threading.Lock()
        self._events = EventLog()

        def tier_pool(tier: Tier, arena: Arena, checksum: Checksum | None) -> TierPool:
            if arena.block_bytes != layout.block_bytes:
                raise ConfigError(f"blocks of {layout.block_bytes} bytes, slots of {arena.block_bytes}")
            cache = BlockCache(arena.num_slots, arena.max_slots, tier, ordering, self._events)
            return TierPool(arena, first_addr(epoch, tier), cache, checksum, self._lock)

        self._dram = tier_pool(Tier.DRAM, arena, Checksum(layout))
        self._hbm = None if hbm is None else tier_pool(Tier.HBM, hbm, None)
        self._tiers = (self._dram,) if self._hbm is None else (self._hbm, self._dram)
        self._foreign: list[ExternalTier] = []
        self._reservations = WriteReservations(self._dram)
        self._leases = Leases(self._tiers)

    # ---- memory

    def alloc_mem(self, num_blocks: int, tier: Tier = Tier.DRAM) -> list[BlockAddr]:
        """That many blocks, PRIVATE to the caller, their bytes undefined. All or nothing.

        Evicts unleased leaves if there are too few free ones. Raises OutOfBlocks, changing nothing.
        Source: MemServe, memory API (alloc_mem).
        """
        return self._tier(tier).alloc(num_blocks)

    def free_mem(self, addrs: Sequence[BlockAddr]) -> None:
        """Give PRIVATE blocks of one tier back.

        Raises BlockStateError, changing nothing, for a block that is free, cached, foreign or named twice.
        Source: MemServe, memory API (free_mem).
        """
        self._home(addrs).free(addrs)

    def block(self, addr: BlockAddr) -> memoryview:
        """The bytes of a block. Write only to your own (PRIVATE), read only what you lease.

        Raises BlockStateError if the address is not of this pool.
        """
        tier = self._home((addr,))
        try:
            return tier.arena.block(addr - tier.first)
        except IndexError:
            raise BlockStateError("a block of another pool") from None

    def slots(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Where blocks of one tier are in its arena, for copies of many at once. Not checked."""
        return list(self._home(addrs).slots(addrs).tolist())

    def seal(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Declare PRIVATE blocks of one tier fully written, never to be written again.

        Returns their checksums, reading the bytes outside the lock; in HBM they carry none yet (0).
        Raises BlockStateError, changing nothing, if one is not PRIVATE.
        """
        return self._home(addrs).seal(addrs)

    def resize(self, num_slots: int) -> int:
        """Give the DRAM tier that many slots, as far as can be; returns how many it has now.

        Cached blocks move out of the slots that go, while there are free ones, or else are evicted.
        A slot that is leased or not the cache's stays, and all before it: call again later.
        Raises ConfigError, changing nothing, for less than 1, more than the arena can have, or too little
        memory. Copies outside the lock, which it takes for a few ns per slot; waits for another resize only.
        """
        return self._dram.resize(num_slots)

    # ---- index

    def insert(
        self, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], parent: BlockKey | None = None
    ) -> Inserted:
        """Index the blocks at `addrs`, of one tier, under `keys`, giving their slots to the cache.

        addrs[i] holds the block keys[i]: PRIVATE and sealed. The keys chain; keys[0] comes after
        `parent`, or begins a prompt. What is not taken (see Inserted) stays the caller's to free.
        Raises BlockStateError, changing nothing, if a block is not PRIVATE, not sealed or named twice.
        Source: MemServe, index API (insert); the rules for duplicates and orphans are ours.
        """
        return self._home(addrs).insert(keys, addrs, parent)

    def num_cached(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are cached. Pure; O(log n), for an engine's scheduler."""
        with self._lock:
            return max(tier.cache.index.tree.depth(keys) for tier in self._tiers)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """The longest cached prefix of a chain of keys, and where each block is: in the nearest tier.

        keys[0] need not begin a prompt. Pure, uncounted. Source: MemServe, index API (match).
        """
        return self._leases.match(keys)

    def chain_to(self, key: BlockKey) -> list[BlockKey]:
        """The keys of a cached prompt's blocks, up to and with this one; none if it is not cached."""
        with self._lock:
            return max((tier.cache.index.tree.chain_to(key) for tier in self._tiers), key=len)

    def ends(self) -> list[BlockKey]:
        """The last blocks of prompts cached in DRAM, those used last first; some may be gone by now."""
        index = self._dram.cache.index
        with self._lock:
            nodes = index.tree.nodes()
        used = [(tick, node.key) for node in nodes if (tick := index.last_use(node))]
        return [key for _, key in sorted(used, reverse=True)]

    def delete(self, keys: Sequence[BlockKey]) -> int:
        """Drop the end of a cached chain, in each tier up to a block that is leased or has others after it.

        Returns how many blocks that were. Source: MemServe, index API (delete).
        """
        with self._lock:
            return sum(tier.cache.delete(keys) for tier in self._tiers)

    def clear(self) -> int:
        """Drop everything that is cached, leased or not: after this nothing old is ever found.

        Leased blocks are quarantined until their last lease ends. Returns how many blocks were dropped.
        """
        with self._lock:
            caches = [tier.cache for tier in self._tiers]
            return sum(cache.drop(root) for cache in caches for root in cache.index.roots())

    # ---- leases

    def acquire(self, match: Match) -> Lease:
        """Keep the matched blocks, and all before them, in their place until `release`.

        What was evicted since the match is not in the lease, so look at its length. Counts hits and
        misses against all keys that the match asked for, hence acquire an empty match, too.
        """
        return self._leases.acquire(match)

    def release(self, lease: Lease) -> None:
        """End a lease. Raises BlockStateError, changing nothing, if it has ended or is another pool's."""
        self._leases.release(lease)

    def verify(self, lease: Lease) -> int:
        """How many of the leased blocks, from the front, hold what was sealed. The lease goes on.

        Reads the bytes, outside the lock. The first block that does not is counted, logged, and
        dropped from the index with all that come after it: those are misses from now on.
        """
        return self._leases.verify(lease)

    def checksums(self, lease: Lease) -> list[int]:
        """Those that the leased blocks carry, for whoever copies them elsewhere: none (0) in HBM."""
        return self._leases.checksums(lease)

    # ---- between HBM and DRAM

    def swap_out(self, num_blocks: int) -> list[BlockAddr]:
        """Move that many blocks from HBM to DRAM, in the order of eviction; returns where they are now.

        Unleased ones, tails before heads. What DRAM lacks of their heads is copied with them. All or
        nothing: raises OutOfBlocks with every block where it was. Source: MemServe (swap_out).
        """
        return swap_out(self._tier(Tier.HBM), self._dram, num_blocks)

    def swap_in(self, addrs: Sequence[BlockAddr]) -> list[BlockAddr]:
        """Copy cached DRAM blocks to HBM: a chain, whose head is in HBM; returns where they are there.

        Fewer, from the front, if a block fails its checksum, which ends as in `verify`. Lease the
        blocks, or another may be in the same place. Raises, changing nothing, OutOfBlocks, or
        BlockStateError for what is not such a chain. Source: MemServe (swap_in).
        """
        return swap_in(self._tier(Tier.HBM), self._dram, addrs)

    # ---- reservations: what peers write to

    def reserve(self, num_blocks: int) -> Reservation:
        """Promise DRAM blocks to a writer elsewhere. Evicts and raises as `alloc_mem`."""
        return self._reservations.begin(num_blocks)

    def commit(self, reservation: Reservation) -> list[BlockAddr]:
        """All bytes have landed: the blocks are the caller's, PRIVATE, to seal and insert.

        Raises BlockStateError, changing nothing, if the reservation has ended or is quarantined.
        """
        return self._reservations.commit(reservation)

    def cancel(self, reservation: Reservation) -> None:
        """Nobody has written, nobody will: the blocks are free. Raises as `commit`."""
        self._reservations.cancel(reservation)

    def quarantine(self, reservation: Reservation) -> None:
        """The writer may still write: keep the blocks from everybody until `settle`. Raises as `commit`."""
        self._reservations.quarantine(reservation)

    def settle(self, reservation: Reservation) -> None:
        """The writer has acknowledged, is fenced or is dead: a quarantined reservation's blocks are free.

        Raises BlockStateError, changing nothing, if it is not quarantined.
        """
        self._reservations.settle(reservation)

    # ---- for those who watch

    def take_events(self) -> list[CacheEvent]:
        """What changed in the index since the last call, numbered; for one publisher."""
        with self._lock:
            return self._events.take()

    def snapshot(self) -> Snapshot:
        """All that is cached, for a follower that joins late."""
        return snapshot(*self.cached())

    def cached(self) -> tuple[int, list[CachedNodes]]:
        """All blocks of each tier, as of the event with this number. Only their lists are copied, locked."""
        with self._lock:
            tiers: list[BlockCache | ExternalTier] = [*(tier.cache for tier in self._tiers), *self._foreign]
            return self._events.sequence(), [(tier.tier, tier.nodes()) for tier in tiers]

    def follow(self, tier: Tier) -> ExternalTier:
        """Tell of somebody else's tier, too. Raises ConfigError if the pool has or follows it already."""
        if any(tier == other for other, _ in self.cached()[1]):
            raise ConfigError(f"one {tier.name} tier is known already")
        self._foreign.append(ExternalTier(tier, self._events, self._lock))
        return self._foreign[-1]

    def num_followed(self) -> dict[Tier, int]:
        """Blocks in tiers of others."""
        return {tier.tier: len(tier) for tier in self._foreign}

    def stats(self, tier: Tier = Tier.DRAM) -> PoolStats:
        """All numbers of one tier, of one moment; leases are the pool's, reservations in DRAM."""
        one = self._tier(tier)
        with self._lock:
            return one.stats(len(self._leases), len(self._reservations) if one is self._dram else 0)

    # ---- tiers

    def _tier(self, tier: Tier) -> TierPool:
        for one in self._tiers:
            if one.cache.tier == tier:
                return one
        raise BlockStateError(f"this pool has no {tier.name}")

    def _home(self, addrs: Sequence[BlockAddr]) -> TierPool:
        """The tier of the first address; if it is foreign, one that will say so."""
        near = self._hbm
        return near if near is not None and addrs and near.holds(addrs[0]) else self._dram

"""MemPool: the paper's verbs on one instance's blocks, in DRAM and in further tiers that the pool owns.

    write   alloc_mem -> fill block(addr) -> seal -> insert -> free_mem what was not new
    read    acquire(match(keys)) -> verify -> copy block(addr) -> release
    receive reserve -> (a peer writes) -> commit -> seal -> insert
    swap    swap_out: HBM -> DRAM      acquire -> verify -> swap_in: DRAM -> HBM -> release

A block is found only after its bytes are complete and have a checksum; a leased block is never
overwritten; a block that fails its checksum is a miss. Knows no peers and no SGLang. HBM belongs to the
engine: the pool copies pages from and to it, and reports what the engine says of it (`ExternalTier`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from memserve.core.block_addr import BlockAddr, Tier, first_addr
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Snapshot
from memserve.core.errors import BlockStateError, ConfigError
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.cache import BlockCache
from memserve.mempool.events import CachedNodes, EventLog, snapshot
from memserve.mempool.eviction import EvictionPolicy, lru
from memserve.mempool.external_tier import ExternalTier
from memserve.mempool.leases import Lease, Leases
from memserve.mempool.records import Inserted, Match, PoolStats
from memserve.mempool.reservations import WriteReservations
from memserve.mempool.tier_pool import Checksum, TierPool


class Device(Protocol):
    """Copies pages of an engine's HBM to and from slots of the pool's DRAM. Knows no keys.

    `pages` is the engine's own sequence of page numbers; each copy is complete when the call returns.
    """

    def pack(self, slots: Sequence[int], pages: Any) -> None:
        """Copy pages[i] to slots[i], all layers."""

    def load_layer(self, layer: int, slots: Sequence[int], pages: Any) -> None:
        """Copy one layer of slots[i] to pages[i]."""


class MemPool(WriteReservations):
    """Blocks of one layout, in one arena per tier. Any thread may call any method.

    One lock guards the metadata. It is held for about a microsecond per block that a call concerns, never
    while bytes move. Each tier is prefix-closed by itself, and a block may be in several tiers.
    The caller opens the arenas, and closes them after the last use of the pool. The base class has the verbs
    of reservations in DRAM: reserve, commit, cancel, quarantine, settle.
    """

    def __init__(
        self,
        layout: KVLayout,
        arena: Arena,
        epoch: Epoch,
        eviction: EvictionPolicy = lru,
        *,
        others: Mapping[Tier, Arena] = MappingProxyType({}),
    ) -> None:
        """`arena`: DRAM; `others`: further tiers. Raises ConfigError if a block size is not the layout's."""
        self.layout = layout
        self.arena = arena
        self._lock = threading.Lock()
        self._events = EventLog()
        checksum = Checksum(layout)

        def tier_pool(tier: Tier, arena: Arena) -> TierPool:
            if arena.block_bytes != layout.block_bytes:
                raise ConfigError(f"blocks of {layout.block_bytes} bytes, slots of {arena.block_bytes}")
            cache = BlockCache(arena.num_slots, arena.max_slots, tier, eviction, self._events)
            return TierPool(arena, first_addr(epoch, tier), cache, checksum, self._lock)

        arenas = {Tier.DRAM: arena, **others}
        self._tiers = {tier: tier_pool(tier, arenas[tier]) for tier in sorted(arenas)}
        self._dram = self._tiers[Tier.DRAM]
        self._external: dict[Tier, ExternalTier] = {}
        super().__init__(self._dram)
        self._leases = Leases(self._tiers)

    def alloc_mem(self, num_blocks: int, tier: Tier = Tier.DRAM) -> list[BlockAddr]:
        """`num_blocks` blocks, PRIVATE to the caller, their bytes undefined. All or nothing.

        Evicts unleased leaves if too few blocks are free. Raises OutOfBlocks, changing nothing.
        Source: MemServe, memory API (alloc_mem).
        """
        return self._tier(tier).alloc(num_blocks)

    def free_mem(self, addrs: Sequence[BlockAddr]) -> None:
        """Give PRIVATE blocks of one tier back.

        Raises BlockStateError, changing nothing, if a block is free, cached, foreign or named twice.
        Source: MemServe, memory API (free_mem).
        """
        self._home(addrs).free(addrs)

    def block(self, addr: BlockAddr) -> memoryview:
        """The bytes of a block. The caller writes only PRIVATE blocks of its own, and reads leased ones.

        Raises BlockStateError if the address is not of this pool.
        """
        tier = self._home((addr,))
        try:
            return tier.arena.block(addr - tier.first)
        except IndexError:
            raise BlockStateError("a block of another pool") from None

    def slots(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """The slots of blocks of one tier in its arena, for bulk copies. Does not check the addresses."""
        return list(self._home(addrs).slots(addrs).tolist())

    def seal(self, addrs: Sequence[BlockAddr]) -> list[int]:
        """Declare PRIVATE blocks of one tier fully written: they must not be written again.

        Returns their checksums, reading the bytes outside the lock.
        Raises BlockStateError, changing nothing, if a block is not PRIVATE.
        """
        return self._home(addrs).seal(addrs)

    def resize(self, num_slots: int) -> int:
        """Resize the DRAM tier to `num_slots` as far as possible; returns how many slots it has now.

        Moves cached blocks out of the slots that go while other slots are free, then evicts them.
        Keeps a slot that is leased or not CACHED, and all slots before it: call again later.
        Raises ConfigError, changing nothing, below 1, above what the arena can have, or if memory is short.
        Copies outside the lock, which it takes for a few ns per slot; waits only for another resize.
        """
        return self._dram.resize(num_slots)

    # ---- index

    def insert(
        self, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], parent: BlockKey | None = None
    ) -> Inserted:
        """Index the blocks at `addrs`, of one tier, under `keys`, giving their slots to the cache.

        addrs[i] holds the block keys[i]: PRIVATE and sealed. The keys are a chain; keys[0] comes after
        `parent`, or begins a prompt. The caller frees what the cache does not take (see Inserted).
        Raises BlockStateError, changing nothing, if a block is not PRIVATE, not sealed or named twice.
        Source: MemServe, index API (insert); the rules for duplicates and orphans are ours.
        """
        return self._home(addrs).insert(keys, addrs, parent)

    def num_cached(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are cached. Pure; O(log n), for an engine's scheduler."""
        with self._lock:
            return max(tier.cache.index.tree.depth(keys) for tier in self._tiers.values())

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """The longest cached prefix of a chain of keys, each block with its address in the nearest tier.

        keys[0] need not begin a prompt. Pure, uncounted. Source: MemServe, index API (match).
        """
        return self._leases.match(keys)

    def chain_to(self, key: BlockKey) -> list[BlockKey]:
        """The keys of a cached prompt's blocks, up to and with this one; none if it is not cached."""
        with self._lock:
            return max((tier.cache.index.tree.chain_to(key) for tier in self._tiers.values()), key=len)

    def recent_leaves(self) -> list[BlockKey]:
        """The last blocks of prompts cached in DRAM, most recently used first; some may be evicted by now."""
        index = self._dram.cache.index
        with self._lock:
            nodes = index.tree.nodes()
        used = [(tick, node.key) for node in nodes if (tick := index.last_use(node))]
        return [key for _, key in sorted(used, reverse=True)]

    def clear(self) -> int:
        """Drop all cached blocks; returns how many. Quarantines leased ones until their last lease ends."""
        with self._lock:
            caches = [tier.cache for tier in self._tiers.values()]
            return sum(cache.drop(root) for cache in caches for root in cache.index.roots())

    # ---- leases

    def acquire(self, match: Match) -> Lease:
        """Keep the matched blocks, and all before them, in their place until `release`.

        The lease is shorter than the match if blocks were evicted since: look at its length. Counts hits
        and misses against all keys that the match asked for, hence acquire an empty match, too.
        """
        return self._leases.acquire(match)

    def release(self, lease: Lease) -> None:
        """End a lease. Raises BlockStateError, changing nothing, if it has ended or is another pool's."""
        self._leases.release(lease)

    def verify(self, lease: Lease) -> int:
        """How many of the leased blocks, from the front, hold what was sealed. The lease goes on.

        Reads the bytes, outside the lock. The first block that fails its checksum is counted, logged, and
        dropped from the index with all blocks after it: they are misses from now on.
        """
        return self._leases.verify(lease)

    def checksums(self, lease: Lease) -> list[int]:
        """The checksums that the leased blocks carry, for a copy to another pool."""
        return self._leases.checksums(lease)

    # ---- between HBM and DRAM

    def swap_out(
        self, keys: Sequence[BlockKey], device: Device, pages: Any, parent: BlockKey | None = None
    ) -> int | None:
        """Copy pages of HBM to DRAM, with a checksum each, and cache them under `keys`.

        pages[i] holds the block keys[i]; the keys are a chain after `parent`. The engine chooses the pages
        (SGLang's radix cache, by its own eviction order), keeps them in place until this returns, and frees
        them itself. Blocks that DRAM has are not copied. Returns how many were copied; None, caching
        nothing, if `parent` is not in DRAM. Raises OutOfBlocks, changing nothing, if DRAM has no room.
        Source: MemServe (swap_out); there the pool chooses the victims.
        """
        with self._lock:
            known = self._dram.cache.index.tree.depth(keys)
        if known == len(keys):
            return 0
        addrs = self._dram.alloc(len(keys) - known)
        device.pack(self.slots(addrs), pages[known:])
        self._dram.seal(addrs)
        inserted = self._dram.insert(keys[known:], addrs, keys[known - 1] if known else parent)
        self._dram.free([*inserted.duplicates, *inserted.orphans])
        return None if inserted.orphans else len(addrs)

    def swap_in(
        self, leases: Sequence[Lease], device: Device, pages: Any, on_layer: Callable[[int], object]
    ) -> None:
        """Copy leased blocks from DRAM to pages of HBM, layer by layer; DRAM keeps its copies.

        pages[i] receives the i-th block of all `leases` in order. The caller has verified the leases,
        holds them until this returns, and owns the pages. Calls `on_layer` with each layer that is
        complete. Raises what the device raises; the pages are undefined then. Source: MemServe (swap_in).
        """
        slots = [slot for lease in leases for slot in self.slots(lease.addrs)]
        for layer in range(self.layout.num_layers):
            device.load_layer(layer, slots, pages)
            on_layer(layer)

    # ---- events and statistics

    def take_events(self) -> list[CacheEvent]:
        """Changes of the index since the last call, numbered; for one publisher."""
        with self._lock:
            return self._events.take()

    def snapshot(self) -> Snapshot:
        """All cached blocks, for a follower that joins late."""
        return snapshot(*self.cached())

    def cached(self) -> tuple[int, list[CachedNodes]]:
        """All blocks of each tier, as of the event with this number. Copies only lists under the lock."""
        with self._lock:
            own = [(tier, pool.cache.nodes()) for tier, pool in self._tiers.items()]
            external = [(tier, pool.nodes()) for tier, pool in self._external.items()]
            return self._events.sequence(), [*own, *external]

    def add_external_tier(self, tier: Tier) -> ExternalTier:
        """Report another owner's tier in events and snapshots. Raises ConfigError if the pool has it."""
        if tier in self._tiers or tier in self._external:
            raise ConfigError(f"one {tier.name} tier is known already")
        external = self._external[tier] = ExternalTier(tier, self._events, self._lock)
        return external

    def external_blocks(self) -> dict[Tier, int]:
        """Number of blocks in each external tier."""
        return {tier: len(external) for tier, external in self._external.items()}

    def stats(self, tier: Tier = Tier.DRAM) -> PoolStats:
        """All numbers of one tier, of one moment; leases are the pool's, reservations in DRAM."""
        pool = self._tier(tier)
        with self._lock:
            return pool.stats(len(self._leases), self.num_reservations if pool is self._dram else 0)

    def stats_by_tier(self) -> dict[Tier, PoolStats]:
        """The numbers of each tier that the pool owns, nearest first."""
        return {tier: self.stats(tier) for tier in self._tiers}

    def _tier(self, tier: Tier) -> TierPool:
        if tier is Tier.DRAM:  # Hashing an enum takes longer.
            return self._dram
        if tier not in self._tiers:
            raise BlockStateError(f"this pool has no {tier.name} tier")
        return self._tiers[tier]

    def _home(self, addrs: Sequence[BlockAddr]) -> TierPool:
        """The tier of the first address; DRAM, which refuses it, if the address is foreign."""
        if addrs and not self._dram.holds(addrs[0]):
            for tier in self._tiers.values():
                if tier.holds(addrs[0]):
                    return tier
        return self._dram

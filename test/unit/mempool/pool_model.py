"""What a MemPool ought to hold, in plain dicts: the state that the machines' rules keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from memserve.core.block_addr import BlockAddr, Tier, slot_of
from memserve.core.block_keys import BlockKey
from memserve.mempool.eviction import EVICTION_POLICIES, EvictionName
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool
from memserve.mempool.records import Reservation
from memserve.testing.cache_follower import CacheFollower

from .harness import keys_of, make_pool

NUM_SLOTS, MAX_SLOTS = 12, 14

Prompt = tuple[int, ...]


@dataclass
class TierCounts:
    """A lease, and the prompts of the blocks it pins: those it names and all before them."""

    lease: Lease
    pinned: list[Prompt]
    addrs: set[BlockAddr]
    near: list[Prompt] = field(default_factory=list)
    """Those pinned in HBM."""


class PoolModel(RuleBasedStateMachine):
    """Who owns which address, and which prefix is cached where."""

    @initialize(eviction=st.sampled_from(sorted(EVICTION_POLICIES)))
    def open(self, eviction: EvictionName) -> None:
        self.pool = self.make(eviction)
        self.num_slots = NUM_SLOTS
        self.private: dict[BlockAddr, bool] = {}  # address -> sealed
        self.cached: dict[tuple[int, ...], BlockAddr] = {}
        self.reserved: dict[int, Reservation] = {}
        self.quarantined: dict[int, Reservation] = {}
        self.held: list[TierCounts] = []
        self.dropped: dict[BlockAddr, int] = {}  # cached no longer, but leased so many times
        self.follower = CacheFollower()
        self.everyone: list[BlockAddr] = []
        self.corruptions = 0

    def make(self, eviction: EvictionName) -> MemPool:
        return make_pool(NUM_SLOTS, EVICTION_POLICIES[eviction], max_slots=MAX_SLOTS)

    def teardown(self) -> None:
        """After the last request: private = reserved = leases = 0."""
        if not hasattr(self, "pool"):
            return
        for held in self.held:
            self.pool.release(held.lease)
        for reservation in self.reserved.values():
            self.pool.cancel(reservation)
        for reservation in self.quarantined.values():
            self.pool.settle(reservation)
        self.pool.free_mem(list(self.private))
        stats = self.pool.stats()
        assert (stats.private, stats.reserved, stats.quarantined, stats.leases) == (0, 0, 0, 0)
        assert stats.evictable == stats.cached
        self.pool.arena.close()

    # ---- what the model knows

    def pinned(self) -> set[Prompt]:
        return {prompt for held in self.held for prompt in held.pinned if prompt in self.cached}

    def depth(self, prompt: list[int]) -> int:
        depth = 0
        while depth < len(prompt) and tuple(prompt[: depth + 1]) in self.cached:
            depth += 1
        return depth

    def reach(self, prompt: list[int]) -> int:
        """How much of a prompt some tier has."""
        return self.depth(prompt)

    def observe_evictions(self, num_blocks: int) -> None:
        """Take over what the pool evicted, which must be what it may, and no more than it has to."""
        kept = {prompt: addr for prompt, addr in self.cached.items() if self.is_cached(prompt)}
        gone = set(self.cached) - set(kept)
        assert len(gone) == num_blocks
        assert not gone & self.pinned(), "leased blocks are never evicted"
        assert all(prompt[:-1] in kept for prompt in kept if len(prompt) > 1), "never an ancestor first"
        self.cached = kept

    def is_cached(self, prompt: Prompt) -> bool:
        """In DRAM."""
        return keys_of(prompt)[-1] in self.pool._dram.cache.index.tree

    def where(self, prompt: Prompt) -> BlockAddr:
        """The nearest place of a cached block."""
        return self.cached[prompt]

    def tiers_of_keys(self) -> dict[BlockKey, int]:
        """What a follower has to know."""
        return {keys_of(prompt)[-1]: 1 << Tier.DRAM for prompt in self.cached}

    def fixed(self) -> set[BlockAddr]:
        """Blocks that cannot move."""
        promised = {
            addr for one in (*self.reserved.values(), *self.quarantined.values()) for addr in one.addrs
        }
        leased = {self.cached[prompt] for prompt in self.pinned()}
        return {*self.private, *self.dropped, *promised, *leased}

    def expect_resizing(self, num_slots: int) -> tuple[int, int]:
        """The size that can be reached, and the evictions that takes."""
        if num_slots >= self.num_slots:
            return num_slots, 0
        used = self.fixed() | set(self.cached.values())
        above = [addr for addr in used - self.fixed() if slot_of(addr) >= num_slots]
        free_below = num_slots - sum(slot_of(addr) < num_slots for addr in used)
        reached = max([num_slots, *(slot_of(addr) + 1 for addr in self.fixed())])
        return reached, max(0, len(above) - free_below)

    def num_free(self) -> int:
        others = (*self.reserved.values(), *self.quarantined.values())
        promised = sum(len(reservation.addrs) for reservation in others)
        return self.num_slots - len(self.private) - len(self.cached) - promised - len(self.dropped)

    def expect_taking(self, num_blocks: int) -> int | None:
        """How many evictions that takes; None if it cannot be."""
        evictable = len(self.cached) - len(self.pinned())
        missing = max(0, num_blocks - self.num_free())
        return None if missing > evictable else missing

    def drop(self, gone: set[Prompt]) -> None:
        pins = Counter(prompt for held in self.held for prompt in held.pinned)
        for prompt in gone:
            addr = self.cached.pop(prompt)
            if pins[prompt]:
                self.dropped[addr] = pins[prompt]
        for held in self.held:
            held.pinned = [prompt for prompt in held.pinned if prompt not in gone]

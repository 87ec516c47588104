"""The expected content of a MemPool in plain dicts, which the rules of the state machines update."""

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
class HeldLease:
    """A lease, and the prompts of the blocks it pins: the leased ones and all before them."""

    lease: Lease
    pinned: list[Prompt]
    addrs: set[BlockAddr]
    near: list[Prompt] = field(default_factory=list)
    """The prompts of blocks that it pins in HBM."""


class PoolModel(RuleBasedStateMachine):
    """The owner of each address, and the address of each cached prefix."""

    @initialize(eviction=st.sampled_from(sorted(EVICTION_POLICIES)))
    def open(self, eviction: EvictionName) -> None:
        self.pool = self.make(eviction)
        self.num_slots = NUM_SLOTS
        self.private: dict[BlockAddr, bool] = {}  # address -> sealed
        self.cached: dict[tuple[int, ...], BlockAddr] = {}
        self.reserved: dict[int, Reservation] = {}
        self.quarantined: dict[int, Reservation] = {}
        self.held: list[HeldLease] = []
        self.dropped: dict[BlockAddr, int] = {}  # not cached any more -> number of leases
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

    # ---- state of the model

    def pinned(self) -> set[Prompt]:
        return {prompt for held in self.held for prompt in held.pinned if prompt in self.cached}

    def depth(self, prompt: list[int]) -> int:
        depth = 0
        while depth < len(prompt) and tuple(prompt[: depth + 1]) in self.cached:
            depth += 1
        return depth

    def reach(self, prompt: list[int]) -> int:
        """How many blocks of a prompt are in some tier."""
        return self.depth(prompt)

    def observe_evictions(self, num_blocks: int) -> None:
        """Remove the evicted blocks, which must be evictable and `num_blocks` in number."""
        kept = {prompt: addr for prompt, addr in self.cached.items() if self.is_cached(prompt)}
        gone = set(self.cached) - set(kept)
        assert len(gone) == num_blocks
        assert not gone & self.pinned(), "leased blocks are never evicted"
        assert all(prompt[:-1] in kept for prompt in kept if len(prompt) > 1), "never an ancestor first"
        self.cached = kept

    def is_cached(self, prompt: Prompt) -> bool:
        """Whether the block is in DRAM."""
        return keys_of(prompt)[-1] in self.pool._dram.cache.index.tree

    def where(self, prompt: Prompt) -> BlockAddr:
        """The address of a cached block in the nearest tier."""
        return self.cached[prompt]

    def tiers_of_keys(self) -> dict[BlockKey, int]:
        """Tiers of each key, as a follower must know them."""
        return {keys_of(prompt)[-1]: 1 << Tier.DRAM for prompt in self.cached}

    def fixed(self) -> set[BlockAddr]:
        """Blocks that cannot move."""
        promised = {
            addr for one in (*self.reserved.values(), *self.quarantined.values()) for addr in one.addrs
        }
        leased = {self.cached[prompt] for prompt in self.pinned()}
        return {*self.private, *self.dropped, *promised, *leased}

    def expect_resizing(self, num_slots: int) -> tuple[int, int]:
        """The size that a resize reaches, and its evictions."""
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
        """Evictions for `num_blocks` new blocks; None if there is no room."""
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

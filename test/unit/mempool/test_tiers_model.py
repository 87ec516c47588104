"""A pool with a second tier of its own, nearer than DRAM, against plain dicts: the rules of both."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule

from memserve.core.block_addr import BlockAddr, Tier, tier_of
from memserve.core.block_keys import BlockKey
from memserve.core.errors import OutOfBlocks
from memserve.mempool.eviction import EVICTION_POLICIES, EvictionName
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool

from .harness import content, keys_of, make_pool, write
from .pool_model import MAX_SLOTS, NUM_SLOTS, HeldLease, Prompt
from .test_pool_model import PoolMachine, picks, prompts

HBM_SLOTS = 7


class TiersMachine(PoolMachine):
    """The content of HBM, beside that of DRAM in PoolModel."""

    def make(self, eviction: EvictionName) -> MemPool:
        return make_pool(NUM_SLOTS, EVICTION_POLICIES[eviction], max_slots=MAX_SLOTS, hbm_slots=HBM_SLOTS)

    @initialize()
    def open_hbm(self) -> None:
        self.near: dict[Prompt, BlockAddr] = {}
        self.near_dropped: dict[BlockAddr, int] = {}

    # ---- state of the model

    def near_depth(self, prompt: list[int]) -> int:
        depth = 0
        while depth < len(prompt) and tuple(prompt[: depth + 1]) in self.near:
            depth += 1
        return depth

    def near_pinned(self) -> set[Prompt]:
        return {prompt for held in self.held for prompt in held.near if prompt in self.near}

    def reach(self, prompt: list[int]) -> int:
        return max(self.depth(prompt), self.near_depth(prompt))

    def where(self, prompt: Prompt) -> BlockAddr:
        return self.near.get(prompt) or self.cached[prompt]

    def tiers_of_keys(self) -> dict[BlockKey, int]:
        bits: Counter[BlockKey] = Counter(super().tiers_of_keys())
        for prompt in self.near:
            bits[keys_of(prompt)[-1]] += 1 << Tier.HBM
        return dict(bits)

    def near_room(self) -> int:
        return HBM_SLOTS - len(self.near) - len(self.near_dropped)

    def observe_near(self, num_gone: int) -> set[Prompt]:
        """Remove the evicted blocks of HBM, which must be evictable and `num_gone` in number."""
        tree = self.pool._tiers[Tier.HBM].cache.index.tree
        gone = {prompt for prompt in self.near if keys_of(prompt)[-1] not in tree}
        assert len(gone) == num_gone
        assert not gone & self.near_pinned(), "leased blocks never leave"
        for prompt in gone:
            del self.near[prompt]
        assert all(prompt[:-1] in self.near for prompt in self.near if len(prompt) > 1), "tail before head"
        return gone

    # ---- rules

    @rule(prompt=prompts)
    def store_near(self, prompt: list[int]) -> None:
        evictable = len(self.near) - len(self.near_pinned())
        missing = max(0, len(prompt) - self.near_room())
        keys = keys_of(prompt)
        if missing > evictable:
            with pytest.raises(OutOfBlocks):
                self.pool.alloc_mem(len(prompt), Tier.HBM)
            return
        addrs = write(self.pool, keys, Tier.HBM)
        assert {tier_of(addr) for addr in addrs} == {Tier.HBM}
        self.observe_near(missing)
        known = self.near_depth(prompt)
        inserted = self.pool.insert(keys, addrs)
        assert list(inserted.new) == addrs[known:]
        self.pool.free_mem(inserted.duplicates)
        for i, addr in enumerate(inserted.new, known):
            self.near[tuple(prompt[: i + 1])] = addr

    def hold(self, lease: Lease, prompt: list[int], start: int) -> None:
        first = tuple(prompt[: start + 1])
        near = self.near_depth(prompt) if first in self.near else start
        far = self.depth(prompt) if first in self.cached else start
        chain = [tuple(prompt[: i + 1]) for i in range(max(near, far))]
        assert list(lease.addrs) == [self.where(one) for one in chain[start:]]
        in_near = chain[:near] if near > start else []
        in_far = chain[:far] if far > near else []
        addrs = {self.near[one] for one in in_near} | {self.cached[one] for one in in_far}
        self.held.append(HeldLease(lease, in_far, addrs, in_near))
        assert self.pool.verify(lease) == len(lease)

    @precondition(lambda self: self.held)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        addrs = self.held[pick % len(self.held)].addrs
        self.release_one(pick)
        for addr in addrs & set(self.near_dropped):
            self.near_dropped[addr] -= 1
            if not self.near_dropped[addr]:
                del self.near_dropped[addr]

    def expect_clearing(self) -> int:
        count = super().expect_clearing() + len(self.near)
        pins = Counter(prompt for held in self.held for prompt in held.near)
        self.near_dropped |= {addr: pins[prompt] for prompt, addr in self.near.items() if pins[prompt]}
        self.near = {}
        for held in self.held:
            held.near = []
        return count

    # ---- after every step

    @invariant()
    def the_states_of_hbm_add_up(self) -> None:
        if not hasattr(self, "near_dropped"):
            return
        stats = self.pool.stats(Tier.HBM)
        assert (stats.cached, stats.quarantined) == (len(self.near), len(self.near_dropped))
        assert (stats.private, stats.reserved, stats.total) == (0, 0, HBM_SLOTS)
        assert stats.free == self.near_room()
        assert stats.evictable == len(self.near) - len(self.near_pinned())

    @invariant()
    def what_is_in_hbm_is_found_there_with_its_bytes(self) -> None:
        if not hasattr(self, "near"):
            return
        for prompt, addr in self.near.items():
            keys = keys_of(prompt)
            assert self.pool.match(keys).addrs[-1] == addr
            assert self.pool.block(addr) == content(keys[-1])
        assert len(set(self.near.values())) == len(self.near), "a slot has one owner"


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=120, stateful_step_count=60, deadline=None, derandomize=True)

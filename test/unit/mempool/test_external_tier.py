"""ExternalTier: in the pool's events and snapshots alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Removed, Stored
from memserve.core.errors import ConfigError
from memserve.mempool.events import digest
from memserve.testing.cache_follower import CacheFollower

from .harness import keys_of, make_pool, store

A, B, C, D = keys_of([1, 2, 3, 4])
DRAM, HBM = 1 << Tier.DRAM, 1 << Tier.HBM
NUM_SLOTS = 6


def test_external_blocks_are_published_with_the_pool_blocks_and_never_matched() -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    store(pool, [1])
    assert hbm.stored([A, B]) == 2
    assert pool.take_events() == [Stored(1, Tier.DRAM, None, (A,)), Stored(2, Tier.HBM, None, (A, B))]
    assert pool.num_cached([A, B]) == len(pool.match([A, B])) == 1
    assert pool.chain_to(B) == []
    assert pool.stats().cached == 1
    assert len(hbm) == 2


def test_clearing_the_pool_keeps_external_blocks() -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    hbm.stored([A])
    assert pool.clear() == 0
    assert len(hbm) == 1
    assert hbm.clear() == 1
    assert pool.take_events() == []


def test_blocks_without_their_parent_are_not_published() -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    store(pool, [1, 2])
    pool.take_events()
    assert hbm.stored([C, D], parent=B) == 0, "its parent is in another tier"
    assert len(hbm) == 0
    assert pool.take_events() == []
    hbm.stored([A, B])
    assert hbm.stored([B, C], parent=A) == 2
    assert hbm.stored([]) == 0
    assert pool.take_events() == [Stored(2, Tier.HBM, None, (A, B, C))]


@pytest.mark.parametrize("order", [[A, B, C, D], [D, C, B, A], [C, A, D, B], [A]])
def test_removed_blocks_leave_children_first_in_any_order_of_keys(order: list[BlockKey]) -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    hbm.stored([A, B, C, D])
    pool.take_events()
    assert hbm.removed(order) == 4
    (event,) = pool.take_events()
    assert isinstance(event, Removed)
    place = {key: i for i, key in enumerate(event.keys)}
    assert place[D] < place[C] < place[B] < place[A]


def test_removal_of_unknown_blocks_is_ignored() -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    hbm.stored([A])
    assert hbm.removed([B, C]) == 0
    assert len(hbm) == 1


def test_each_tier_has_one_owner() -> None:
    pool = make_pool(4)
    pool.add_external_tier(Tier.HBM)
    for tier in (Tier.HBM, Tier.DRAM):
        with pytest.raises(ConfigError, match=tier.name):
            pool.add_external_tier(tier)
    with pytest.raises(ConfigError, match="HBM"):
        make_pool(4, hbm_slots=4).add_external_tier(Tier.HBM)


def test_digest_depends_on_the_set_of_blocks() -> None:
    pool = make_pool(8)
    hbm = pool.add_external_tier(Tier.HBM)
    store(pool, [1, 2, 3])
    for key, parent in ((A, None), (B, A), (C, B)):
        hbm.stored([key], parent)
    sequence, cached = pool.cached()
    assert sequence == pool.take_events()[-1].sequence
    in_dram, in_hbm = (digest(nodes) for _, nodes in cached)
    assert in_dram == in_hbm
    xor = reduce(int.__xor__, (int.from_bytes(key[:8]) for key in (A, B, C)))
    assert in_hbm == (3, f"{xor:016x}")
    hbm.clear()
    assert digest(pool.cached()[1][1][1]) == (0, "0" * 16)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=5)


class ForeignMachine(RuleBasedStateMachine):
    """Both tiers change at random; the events' follower equals the snapshot and the model."""

    @initialize()
    def open(self) -> None:
        self.pool = make_pool(NUM_SLOTS)
        self.hbm = self.pool.add_external_tier(Tier.HBM)
        self.held: set[tuple[int, ...]] = set()
        self.follower = CacheFollower()
        self.late = CacheFollower()

    @rule(prompt=prompts, start=st.integers(0, 4))
    def told_stored(self, prompt: list[int], start: int) -> None:
        start = min(start, len(prompt) - 1)
        keys = keys_of(prompt)
        is_reachable = start == 0 or tuple(prompt[:start]) in self.held
        count = self.hbm.stored(keys[start:], keys[start - 1] if start else None)
        assert count == (len(prompt) - start if is_reachable else 0)
        if is_reachable:
            self.held |= prefixes(prompt)

    @rule(prompt=prompts, others=st.lists(prompts, max_size=3))
    def told_removed(self, prompt: list[int], others: list[list[int]]) -> None:
        gone = {one for one in self.held if any(one[: len(top)] == tuple(top) for top in (prompt, *others))}
        assert self.hbm.removed([keys_of(one)[-1] for one in (prompt, *others)]) == len(gone)
        self.held -= gone

    @rule()
    def told_cleared(self) -> None:
        assert self.hbm.clear() == len(self.held)
        self.held = set()

    @rule(prompt=prompts)
    def store(self, prompt: list[int]) -> None:
        store(self.pool, prompt)

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @rule(lost=st.booleans())
    def follow(self, lost: bool) -> None:
        events = self.pool.take_events()
        if lost and events:
            assert all(map(self.follower.apply, events[:-1]))
            self.follower.reset(self.pool.snapshot())
        else:
            assert all(map(self.follower.apply, events))
        assert tiers_of(self.follower) == self.truth()

    @rule()
    def join(self) -> None:
        """A snapshot contains the events that were not taken yet; its receiver skips them later."""
        self.late = CacheFollower()
        self.late.reset(self.pool.snapshot())
        assert tiers_of(self.late) == self.truth()
        events = self.pool.take_events()
        for follower in (self.late, self.follower):
            assert all(map(follower.apply, events))
            assert tiers_of(follower) == self.truth()

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "hbm"):
            assert len(self.hbm) == len(self.held)
            assert len(self.pool._events) <= 4 * 2**5

    def truth(self) -> dict[BlockKey, int]:
        dram = {node.key: DRAM for node in self.pool._dram.cache.nodes()}
        hbm = {keys_of(prompt)[-1]: HBM for prompt in self.held}
        return {key: dram.get(key, 0) | hbm.get(key, 0) for key in {**dram, **hbm}}

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.arena.close()


def prefixes(prompt: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(prompt[: i + 1]) for i in range(len(prompt))}


def tiers_of(follower: CacheFollower) -> dict[BlockKey, int]:
    return {node.key: node.payload for node in follower.tree}


TestForeignTier = ForeignMachine.TestCase
TestForeignTier.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_events_carry_both_tiers_in_one_sequence() -> None:
    pool = make_pool(4)
    hbm = pool.add_external_tier(Tier.HBM)
    follower = CacheFollower()
    hbm.stored([A, B])
    store(pool, [1])
    events: list[CacheEvent] = pool.take_events()
    assert [(event.sequence, event.tier) for event in events] == [(1, Tier.DRAM), (2, Tier.HBM)]
    assert all(map(follower.apply, events))
    hbm.clear()
    assert all(map(follower.apply, pool.take_events()))
    assert tiers_of(follower) == {A: DRAM}

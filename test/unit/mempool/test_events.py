"""Events: net effects, chains, gaps, snapshots, tiers."""

from __future__ import annotations

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.cache_events import CacheEvent, Removed, Stored
from memserve.mempool.events import chains
from memserve.testing.cache_follower import CacheFollower

from .harness import keys_of, make_pool, store

A, B, C, D = keys_of([1, 2, 3, 4])


def test_chain_is_one_event_and_branch_is_another() -> None:
    pool = make_pool(8)
    store(pool, [1, 2, 3])
    store(pool, [1, 2, 9])
    first, second = pool.take_events()
    assert first == Stored(1, Tier.DRAM, None, (A, B, C))
    assert second == Stored(2, Tier.DRAM, B, (keys_of([1, 2, 9])[2],))
    assert pool.take_events() == []


def test_block_stored_and_removed_in_between_is_left_out() -> None:
    pool = make_pool(8)
    store(pool, [1, 2])
    pool.clear()
    assert pool.take_events() == []
    store(pool, [1, 2])
    pool.take_events()
    pool.clear()
    store(pool, [1, 2])
    assert pool.take_events() == []


def test_removals_precede_stores_and_children_precede_parents() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    pool.take_events()
    store(pool, [5, 6, 7, 8])
    removed, stored = pool.take_events()
    assert removed == Removed(2, Tier.DRAM, (B, A))
    assert stored == Stored(3, Tier.DRAM, None, tuple(keys_of([5, 6, 7, 8])))


def test_event_log_does_not_grow_when_events_are_not_taken() -> None:
    pool = make_pool(4)
    for turn in range(500):
        store(pool, [turn, 1])
    assert len(pool._events) <= 4


def test_gap_is_detected_and_a_snapshot_repairs_the_follower() -> None:
    pool = make_pool(8)
    follower = CacheFollower()
    store(pool, [1])
    pool.take_events()  # lost
    store(pool, [1, 2])
    (event,) = pool.take_events()
    assert not follower.apply(event)
    assert len(follower.tree) == 0
    follower.reset(pool.snapshot())
    assert {node.key for node in follower.tree} == {A, B}
    assert follower.apply(event), "an old event changes nothing"
    store(pool, [1, 2, 3])
    assert all(map(follower.apply, pool.take_events()))
    assert C in follower.tree


def test_snapshot_orders_chains_so_that_parents_come_first() -> None:
    pool = make_pool(16)
    for prompt in ([1, 2, 3], [1, 4], [5], [1, 2, 6, 7]):
        store(pool, prompt)
    late = CacheFollower()
    late.reset(pool.snapshot())
    assert len(late.tree) == pool.stats().cached
    assert late.sequence == pool.take_events()[-1].sequence


def test_follower_keeps_a_block_while_a_tier_holds_it_or_a_descendant() -> None:
    follower = CacheFollower()
    events: list[CacheEvent] = [
        Stored(1, Tier.HBM, None, (A, B)),
        Stored(2, Tier.DRAM, None, (A,)),
        Removed(3, Tier.DRAM, (A,)),
        Removed(4, Tier.HBM, (B, A)),
    ]
    sizes = []
    for event in events:
        assert follower.apply(event)
        sizes.append({node.key: node.payload for node in follower.tree})
    hbm, dram = 1 << Tier.HBM, 1 << Tier.DRAM
    assert sizes == [{A: hbm, B: hbm}, {A: hbm | dram, B: hbm}, {A: hbm, B: hbm}, {}]


def test_chains_are_runs_of_parents_and_children() -> None:
    assert chains([]) == []
    assert chains([(A, None), (B, A), (D, A), (C, B)]) == [(None, (A, B)), (A, (D,)), (B, (C,))]


def test_events_survive_encoding() -> None:
    event = Stored(7, Tier.DRAM, A, (B, C))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Stored | Removed)
    assert decoded == event

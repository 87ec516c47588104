"""Changes of blocks while `resize` moves them, between the copy and the update of the index."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memserve.core.block_addr import Tier, slot_of
from memserve.mempool.allocator import Slots
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool

from .harness import content, keys_of, make_pool, store

HBM, DRAM = Tier.HBM, Tier.DRAM

Action = Callable[[], object]


def while_moving(pool: MemPool, monkeypatch: pytest.MonkeyPatch, action: Action) -> None:
    """Call `action` once, after the first copy of blocks that a resize moves."""
    copy, actions = pool._dram._copy, [action]

    def copy_and_act(sources: Slots, targets: Slots) -> None:
        copy(sources, targets)
        if actions:
            actions.pop()()

    monkeypatch.setattr(pool._dram, "_copy", copy_and_act)


def nothing_is_lost(pool: MemPool) -> bool:
    return all(
        (stats.private, stats.quarantined, stats.free + stats.cached) == (0, 0, stats.total)
        for stats in map(pool.stats, (HBM, DRAM))
    )


def test_resize_leaves_a_block_that_is_leased_during_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool(8, hbm_slots=1)
    filler = pool.alloc_mem(4)
    store(pool, [1])
    store(pool, [2])
    pool.free_mem(filler)
    leases: list[Lease] = []
    while_moving(pool, monkeypatch, lambda: leases.append(pool.acquire(pool.match(keys_of([1])))))
    (addr,) = pool.match(keys_of([1])).addrs
    assert pool.resize(4) == slot_of(addr) + 1
    assert leases[0].addrs == [addr] == pool.match(keys_of([1])).addrs
    assert slot_of(pool.match(keys_of([2])).addrs[0]) < 4
    pool.release(leases[0])
    assert pool.resize(4) == 4
    assert nothing_is_lost(pool)


def test_resize_drops_the_copy_of_a_block_that_left_its_slot_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool(8, hbm_slots=1)
    filler = pool.alloc_mem(4)
    store(pool, [1])
    pool.free_mem(filler)
    while_moving(pool, monkeypatch, pool.clear)
    assert pool.resize(4) == 4
    assert pool.num_cached(keys_of([1])) == 0
    store(pool, [3])
    with pool.acquire(pool.match(keys_of([3]))) as lease:
        assert pool.verify(lease) == 1
    assert nothing_is_lost(pool)


def test_resize_keeps_the_parent_links_of_a_chain_that_moves() -> None:
    pool = make_pool(8, hbm_slots=1)
    filler = pool.alloc_mem(4)
    store(pool, [1, 2, 3])
    pool.free_mem(filler)
    assert pool.resize(3) == 3
    match = pool.match(keys_of([1, 2, 3]))
    assert [pool.block(addr) for addr in match.addrs] == [content(key) for key in match.keys]
    with pool.acquire(match):
        assert pool.stats().evictable == 0
    assert pool.stats().evictable == 3

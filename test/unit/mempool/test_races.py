"""What others do to blocks while their bytes move, at the very moment between copy and index."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memserve.core.block_addr import Tier, slot_of, tier_of
from memserve.mempool import swap
from memserve.mempool.allocator import Slots
from memserve.mempool.lease import Lease
from memserve.mempool.pool import MemPool

from .harness import content, keys_of, make_pool, store

HBM, DRAM = Tier.HBM, Tier.DRAM

Action = Callable[[], object]
Meanwhile = Callable[[Action], None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Have something happen once, after the first copy of a chain between tiers."""

    def arrange(action: Action) -> None:
        actions = [action]

        def then(copy: Callable[..., object]) -> Callable[..., object]:
            def copy_and_act(*args: object) -> object:
                result = copy(*args)
                if actions:
                    actions.pop()()
                return result

            return copy_and_act

        monkeypatch.setattr(swap, "_copy_out", then(swap._copy_out))
        monkeypatch.setattr(swap, "_copy_in", then(swap._copy_in))

    return arrange


def while_moving(pool: MemPool, monkeypatch: pytest.MonkeyPatch, action: Action) -> None:
    """Have something happen once, after the first copy of blocks that a resize moves."""
    copy, actions = pool._dram._copy, [action]

    def copy_and_act(sources: Slots, targets: Slots) -> None:
        copy(sources, targets)
        if actions:
            actions.pop()()

    monkeypatch.setattr(pool._dram, "_copy", copy_and_act)


def tiers(pool: MemPool, prompt: list[int]) -> list[Tier]:
    return [tier_of(addr) for addr in pool.match(keys_of(prompt)).addrs]


def nothing_is_lost(pool: MemPool) -> bool:
    return all(
        (stats.private, stats.quarantined, stats.free + stats.cached) == (0, 0, stats.total)
        for stats in map(pool.stats, (HBM, DRAM))
    )


def test_a_block_leased_while_it_is_copied_out_stays_and_another_goes(meanwhile: Meanwhile) -> None:
    pool = make_pool(8, hbm_slots=4)
    store(pool, [1], HBM)
    store(pool, [2], HBM)
    leases: list[Lease] = []
    meanwhile(lambda: leases.append(pool.acquire(pool.match(keys_of([1])))))
    pool.swap_out(1)
    assert tiers(pool, [1]) == [HBM]
    assert tiers(pool, [2]) == [DRAM]
    assert pool.block(leases[0].addrs[0]) == content(keys_of([1])[0])
    pool.release(leases[0])
    assert nothing_is_lost(pool)


def test_a_prompt_that_grows_while_it_is_copied_out_loses_its_tail_first(meanwhile: Meanwhile) -> None:
    pool = make_pool(8, hbm_slots=4)
    store(pool, [1], HBM)
    meanwhile(lambda: store(pool, [1, 2], HBM))
    pool.swap_out(1)
    assert tiers(pool, [1, 2]) == [HBM, DRAM]
    assert nothing_is_lost(pool)


def test_a_victim_evicted_while_it_is_copied_out_is_not_indexed(meanwhile: Meanwhile) -> None:
    pool = make_pool(8, hbm_slots=2)
    store(pool, [1, 2], HBM)

    def make_way() -> None:
        assert pool.delete(keys_of([1, 2])) == 2
        store(pool, [7, 8], HBM)  # in the very slots

    meanwhile(make_way)
    pool.swap_out(1)
    assert tiers(pool, [7, 8]) == [HBM, DRAM]
    assert tiers(pool, [1, 2]) == []
    with pool.acquire(pool.match(keys_of([7, 8]))) as lease:
        assert pool.verify(lease) == 2
    assert nothing_is_lost(pool)


@pytest.mark.parametrize("prompt", [[1], [1, 2]])
def test_what_arrives_in_dram_from_elsewhere_meanwhile_is_not_taken_twice(
    meanwhile: Meanwhile, prompt: list[int]
) -> None:
    pool = make_pool(8, hbm_slots=4)
    store(pool, [1, 2], HBM)
    meanwhile(lambda: store(pool, prompt, DRAM))
    pool.swap_out(2)
    assert tiers(pool, [1, 2]) == [DRAM, DRAM]
    assert (pool.stats().cached, pool.stats(HBM).cached) == (2, 0)
    assert nothing_is_lost(pool)


def test_nothing_old_comes_back_from_dram_after_a_clear(meanwhile: Meanwhile) -> None:
    pool = make_pool(4, hbm_slots=4)
    store(pool, [1, 2], DRAM)
    meanwhile(pool.clear)
    assert pool.swap_in(pool.match(keys_of([1, 2])).addrs) == []
    assert pool.num_cached(keys_of([1, 2])) == 0
    assert nothing_is_lost(pool)


def test_what_is_in_hbm_by_now_is_not_taken_twice(meanwhile: Meanwhile) -> None:
    pool = make_pool(4, hbm_slots=4)
    store(pool, [1, 2], DRAM)
    meanwhile(lambda: store(pool, [1], HBM))
    found = pool.swap_in(pool.match(keys_of([1, 2])).addrs)
    assert found == pool.match(keys_of([1, 2])).addrs
    assert pool.stats(HBM).cached == 2
    assert nothing_is_lost(pool)


def test_a_block_leased_while_it_moves_stays(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_slot_given_to_another_block_while_it_moves_is_not_mistaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool(8, hbm_slots=1)
    filler = pool.alloc_mem(4)
    store(pool, [1])
    pool.free_mem(filler)
    while_moving(pool, monkeypatch, lambda: pool.delete(keys_of([1])))
    assert pool.resize(4) == 4
    assert pool.num_cached(keys_of([1])) == 0
    store(pool, [3])
    with pool.acquire(pool.match(keys_of([3]))) as lease:
        assert pool.verify(lease) == 1
    assert nothing_is_lost(pool)


def test_two_blocks_of_a_chain_move_and_stay_a_chain() -> None:
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

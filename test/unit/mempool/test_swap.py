"""Swapping between HBM and DRAM: order, faults and threads; test_swap_model.py has the contract."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import pytest

from memserve.core.block_addr import Tier, tier_of
from memserve.core.cache_events import Follower
from memserve.core.errors import BlockStateError, ConfigError, OutOfBlocks
from memserve.mempool.arena import Arena
from memserve.mempool.checksums import Checksum
from memserve.mempool.pool import MemPool

from .harness import EPOCH, LAYOUT, content, keys_of, make_pool, store

HBM, DRAM = Tier.HBM, Tier.DRAM


def tiers(pool: MemPool, prompt: list[int]) -> list[Tier]:
    return [tier_of(addr) for addr in pool.match(keys_of(prompt)).addrs]


def test_the_tail_goes_first_and_comes_back() -> None:
    pool = make_pool(8, hbm_slots=8)
    store(pool, [1, 2, 3], HBM)
    assert tiers(pool, [1, 2, 3]) == [HBM, HBM, HBM]
    swapped = pool.swap_out(2)
    assert tiers(pool, [1, 2, 3]) == [HBM, DRAM, DRAM]
    match = pool.match(keys_of([1, 2, 3]))
    assert swapped == match.addrs[:0:-1], "tail before head"
    with pool.acquire(match) as lease:
        assert pool.verify(lease) == 3
        assert [pool.block(addr) for addr in lease.addrs] == [content(key) for key in lease.keys]
        back = pool.swap_in(lease.addrs[1:])
    assert tiers(pool, [1, 2, 3]) == [HBM, HBM, HBM]
    assert back == pool.match(keys_of([1, 2, 3])).addrs[1:]


def test_a_prompt_used_last_is_swapped_out_last() -> None:
    pool = make_pool(8, hbm_slots=4)
    store(pool, [1, 2], HBM)
    store(pool, [3, 4], HBM)
    pool.release(pool.acquire(pool.match(keys_of([1, 2]))))
    pool.swap_out(2)
    assert tiers(pool, [1, 2]) == [HBM, HBM]
    assert tiers(pool, [3, 4]) == [DRAM, DRAM]


def test_a_block_carries_its_checksum_from_when_it_leaves_hbm() -> None:
    pool = make_pool(4, hbm_slots=4)
    store(pool, [1, 2], HBM)
    with pool.acquire(pool.match(keys_of([1, 2]))) as lease:
        assert pool.checksums(lease) == [0, 0]
    pool.swap_out(1)
    with pool.acquire(pool.match(keys_of([1, 2]))) as lease:
        assert pool.checksums(lease) == [0, Checksum(LAYOUT).of(content(keys_of([1, 2])[1]))]


def test_what_went_bad_in_dram_does_not_come_back(caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(4, hbm_slots=4)
    store(pool, [1, 2, 3, 4], HBM)
    pool.swap_out(4)
    with (
        caplog.at_level(logging.ERROR),
        pool.acquire(pool.match(keys_of([1, 2, 3, 4]))) as lease,
    ):
        pool.block(lease.addrs[2])[0] ^= 1
        assert len(pool.swap_in(lease.addrs)) == 2
    assert tiers(pool, [1, 2, 3, 4]) == [HBM, HBM]
    assert (pool.stats().corruptions, pool.stats().cached, pool.stats().free) == (1, 2, 2)
    assert "block corrupt" in caplog.text


def test_a_swap_that_does_not_fit_leaves_every_block_where_it_was() -> None:
    pool = make_pool(2, hbm_slots=4)
    store(pool, [1, 2, 3], HBM)
    for num_blocks in (1, 4):  # a tail of 3 with its head is too much for DRAM; 4 are not there
        with pytest.raises(OutOfBlocks):
            pool.swap_out(num_blocks)
    assert tiers(pool, [1, 2, 3]) == [HBM, HBM, HBM]
    store(pool, [7, 8], DRAM)
    with pool.acquire(pool.match(keys_of([1, 2, 3]))), pytest.raises(OutOfBlocks):
        pool.swap_in(pool.match(keys_of([7, 8])).addrs)
    assert pool.stats(HBM).private == pool.stats().private == 0
    assert pool.stats().evictable == 2


def test_what_dram_has_already_leaves_hbm_without_a_copy() -> None:
    pool = make_pool(2, hbm_slots=2)
    store(pool, [1, 2], DRAM)
    store(pool, [1, 2], HBM)
    places = pool.swap_out(2)
    assert sorted(places) == sorted(pool.match(keys_of([1, 2])).addrs)
    assert pool.stats().evictions == 0
    assert pool.stats(HBM).free == 2


def test_a_follower_never_loses_a_block_that_is_swapped_out() -> None:
    pool, follower = make_pool(4, hbm_slots=4), Follower()
    store(pool, [1, 2], HBM)
    pool.take_events()
    follower.reset(pool.snapshot())
    pool.swap_out(2)
    store(pool, [5], HBM)
    for event in pool.take_events():
        assert follower.apply(event)
        assert all(key in follower.tree for key in keys_of([1, 2]))
    assert {node.payload for node in follower.tree} == {1 << HBM, 1 << DRAM}


def test_a_pool_without_hbm_says_so() -> None:
    pool = make_pool(2)
    for verb in (
        lambda: pool.alloc_mem(1, HBM),
        lambda: pool.swap_out(1),
        lambda: pool.swap_in([]),
        lambda: pool.stats(Tier.REMOTE),
    ):
        with pytest.raises(BlockStateError):
            verb()
    other = Arena(LAYOUT.block_bytes + 64, 1)
    with pytest.raises(ConfigError):
        MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 1), EPOCH, hbm=other)


def test_blocks_of_two_tiers_are_not_freed_as_one() -> None:
    pool = make_pool(2, hbm_slots=2)
    far, near = pool.alloc_mem(1), pool.alloc_mem(1, HBM)
    for addrs in ([*far, *near], [*near, *far]):
        with pytest.raises(BlockStateError):
            pool.free_mem(addrs)
    pool.free_mem(far)
    pool.free_mem(near)


def test_threads_swap_and_read_at_once() -> None:
    pool = make_pool(40, hbm_slots=16)
    prompts = [[first, *range(4)] for first in range(5)]
    failures: list[BaseException] = []

    def work(mine: int) -> None:
        try:
            for turn in range(80):
                prompt = prompts[(mine * 2 + turn) % len(prompts)]
                with pool.acquire(pool.match(keys_of(prompt))) as lease:
                    assert pool.verify(lease) == len(lease)
                    for key, addr in zip(lease.keys, lease.addrs, strict=True):
                        assert pool.block(addr) == content(key)
                    # HBM may be full of leased blocks, or the head may have left it.
                    with suppress(OutOfBlocks, BlockStateError):
                        pool.swap_in([addr for addr in lease.addrs if tier_of(addr) == DRAM])
                try:
                    store(pool, prompt, HBM)
                    pool.swap_out(turn % 7)
                except OutOfBlocks:
                    continue
                if turn % 30 == 29:
                    pool.clear()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    for tier in (HBM, DRAM):
        stats = pool.stats(tier)
        assert (stats.private, stats.leases, stats.quarantined, stats.corruptions) == (0, 0, 0, 0)
        assert stats.free + stats.cached == stats.total
        assert stats.evictable == stats.cached
    late, follower = Follower(), Follower()
    late.reset(pool.snapshot())
    assert all(map(follower.apply, pool.take_events()))
    seen = [{node.key: node.payload for node in one.tree} for one in (late, follower)]
    assert seen[0] == seen[1]

"""Swapping between an engine's HBM and DRAM: faults and threads; test_pool_model.py has the contract."""

from __future__ import annotations

import logging
import threading

import pytest

from memserve.core.block_addr import Tier, tier_of
from memserve.core.errors import OutOfBlocks
from memserve.mempool.pool import MemPool
from memserve.mempool.tier_pool import Checksum
from memserve.testing.cache_follower import CacheFollower

from .harness import LAYOUT, FakeDevice, content, keys_of, make_pool, store


def swap_out(pool: MemPool, prompt: list[int], start: int = 0) -> int | None:
    """Swap out a prompt's blocks from `start` on."""
    keys, device = keys_of(prompt), FakeDevice(pool)
    parent = keys[start - 1] if start else None
    return pool.swap_out(keys[start:], device, device.write(keys[start:]), parent)


def is_all_accounted_for(pool: MemPool) -> bool:
    stats = pool.stats()
    return (stats.private, stats.quarantined, stats.free + stats.cached) == (0, 0, stats.total)


def test_keys_and_bytes_survive_a_round_trip_through_dram() -> None:
    pool = make_pool(8)
    keys, device, layers = keys_of([1, 2, 3]), FakeDevice(pool), []
    assert pool.swap_out(keys, device, device.write(keys)) == 3
    match = pool.match(keys)
    assert [tier_of(addr) for addr in match.addrs] == [Tier.DRAM] * 3
    with pool.acquire(match) as lease:
        assert pool.verify(lease) == 3
        pool.swap_in([lease], device, [7, 9, 8], layers.append)
    assert layers == list(range(LAYOUT.num_layers))
    assert [device.pages[page] for page in (7, 9, 8)] == [content(key) for key in keys]
    assert pool.num_cached(keys) == 3, "DRAM keeps its copy"
    assert is_all_accounted_for(pool)


def test_swap_in_takes_several_leases_at_once() -> None:
    pool = make_pool(8)
    store(pool, [1, 2])
    store(pool, [3])
    device = FakeDevice(pool)
    with pool.acquire(pool.match(keys_of([1, 2]))) as one, pool.acquire(pool.match(keys_of([3]))) as other:
        pool.swap_in([one, other], device, [0, 1, 2], lambda _: None)
    assert list(device.pages.values()) == [content(key) for key in (*keys_of([1, 2]), *keys_of([3]))]


def test_a_block_carries_its_checksum_from_when_it_leaves_hbm() -> None:
    pool = make_pool(4)
    swap_out(pool, [1, 2])
    with pool.acquire(pool.match(keys_of([1, 2]))) as lease:
        assert pool.checksums(lease) == [Checksum(LAYOUT).of(content(key)) for key in lease.keys]


def test_a_block_that_went_bad_in_dram_is_not_verified(caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(4)
    swap_out(pool, [1, 2, 3, 4])
    with (
        caplog.at_level(logging.ERROR),
        pool.acquire(pool.match(keys_of([1, 2, 3, 4]))) as lease,
    ):
        pool.block(lease.addrs[2])[0] ^= 1
        assert pool.verify(lease) == 2
    assert pool.num_cached(keys_of([1, 2, 3, 4])) == 2
    assert (pool.stats().corruptions, pool.stats().cached, pool.stats().free) == (1, 2, 2)
    assert "block corrupt" in caplog.text


def test_a_swap_out_that_does_not_fit_changes_nothing() -> None:
    pool = make_pool(2)
    with pytest.raises(OutOfBlocks):
        swap_out(pool, [1, 2, 3])
    assert is_all_accounted_for(pool)
    store(pool, [7, 8])
    with pool.acquire(pool.match(keys_of([7, 8]))), pytest.raises(OutOfBlocks):
        swap_out(pool, [1])
    assert pool.num_cached(keys_of([7, 8])) == 2, "a leased block is not evicted"
    assert pool.stats().evictable == 2
    assert is_all_accounted_for(pool)


def test_blocks_that_dram_has_are_not_copied() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    keys, device = keys_of([1, 2, 3]), FakeDevice(pool)
    assert pool.swap_out(keys, device, device.write(keys)) == 1
    assert device.packed == [2]
    assert pool.swap_out(keys, device, device.write(keys)) == 0
    assert device.packed == [2]
    assert pool.stats().evictions == 0
    assert (pool.stats().cached, pool.stats().free) == (3, 1)


def test_blocks_whose_parent_is_not_in_dram_are_not_cached() -> None:
    pool = make_pool(4)
    assert swap_out(pool, [1, 2, 3], start=1) is None
    assert is_all_accounted_for(pool)
    assert pool.stats().cached == 0
    store(pool, [1])
    assert swap_out(pool, [1, 2, 3], start=1) == 2
    assert pool.num_cached(keys_of([1, 2, 3])) == 3


def test_a_follower_hears_of_blocks_that_are_swapped_out() -> None:
    pool, follower = make_pool(4), CacheFollower()
    follower.reset(pool.snapshot())
    swap_out(pool, [1, 2])
    assert all(map(follower.apply, pool.take_events()))
    assert {node.key: node.payload for node in follower.tree} == dict.fromkeys(
        keys_of([1, 2]), 1 << Tier.DRAM
    )


@pytest.mark.parametrize("prompt", [[1], [1, 2]])
def test_blocks_that_arrive_from_elsewhere_during_the_copy_are_not_cached_twice(prompt: list[int]) -> None:
    pool = make_pool(8)
    keys, device = keys_of([1, 2]), FakeDevice(pool)
    device.meanwhile.append(lambda: store(pool, prompt))
    assert pool.swap_out(keys, device, device.write(keys)) == 2
    assert pool.stats().cached == 2
    with pool.acquire(pool.match(keys)) as lease:
        assert pool.verify(lease) == 2
    assert is_all_accounted_for(pool)


def test_a_chain_whose_head_is_dropped_during_the_copy_is_not_cached() -> None:
    pool = make_pool(8)
    store(pool, [1])
    keys, device = keys_of([1, 2]), FakeDevice(pool)
    device.meanwhile.append(pool.clear)
    assert pool.swap_out(keys, device, device.write(keys)) is None
    assert pool.num_cached(keys) == pool.stats().cached == 0
    assert is_all_accounted_for(pool)


def test_leased_blocks_stay_complete_when_the_pool_is_cleared_during_a_swap_in() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    keys, device = keys_of([1, 2]), FakeDevice(pool)

    def clear() -> None:
        pool.clear()
        store(pool, [7, 8])

    with pool.acquire(pool.match(keys)) as lease:
        device.meanwhile.append(clear)
        pool.swap_in([lease], device, [0, 1], lambda _: None)
    assert list(device.pages.values()) == [content(key) for key in keys]
    assert pool.num_cached(keys) == 0
    assert is_all_accounted_for(pool)


def test_threads_swap_and_read_at_once() -> None:
    pool = make_pool(16)
    prompts = [[first, *range(4)] for first in range(5)]
    failures: list[BaseException] = []

    def work(mine: int) -> None:
        device = FakeDevice(pool)
        try:
            for turn in range(80):
                prompt = prompts[(mine * 2 + turn) % len(prompts)]
                keys = keys_of(prompt)
                with pool.acquire(pool.match(keys)) as lease:
                    assert pool.verify(lease) == len(lease)
                    device.pages.clear()
                    pool.swap_in([lease], device, range(len(lease)), lambda _: None)
                    assert list(device.pages.values()) == [content(key) for key in lease.keys]
                try:
                    pool.swap_out(keys, device, device.write(keys))
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
    stats = pool.stats()
    assert (stats.leases, stats.corruptions) == (0, 0)
    assert is_all_accounted_for(pool)
    assert stats.evictable == stats.cached
    late, follower = CacheFollower(), CacheFollower()
    late.reset(pool.snapshot())
    assert all(map(follower.apply, pool.take_events()))
    seen = [{node.key: node.payload for node in one.tree} for one in (late, follower)]
    assert seen[0] == seen[1]

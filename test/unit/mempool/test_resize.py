"""Resizing a pool: blocks that move, are evicted or stay; test_pool_model.py has the contract."""

from __future__ import annotations

import os
import threading

import pytest

from memserve.core.block_addr import slot_of
from memserve.core.errors import ConfigError, OutOfBlocks
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool

from .harness import content, keys_of, make_pool, store


def test_shrinking_keeps_blocks_that_fit_and_sends_no_event() -> None:
    pool = make_pool(16)
    private = pool.alloc_mem(8)
    store(pool, [1, 2, 3, 4])
    assert min(map(slot_of, pool.match(keys_of([1, 2, 3, 4])).addrs)) >= 8
    pool.free_mem(private)
    pool.take_events()
    assert pool.resize(4) == 4
    assert pool.take_events() == []
    with pool.acquire(pool.match(keys_of([1, 2, 3, 4]))) as lease:
        assert pool.verify(lease) == 4
        assert sorted(map(slot_of, lease.addrs)) == [0, 1, 2, 3]
        assert [pool.block(addr) for addr in lease.addrs] == [content(key) for key in lease.keys]
    assert (pool.stats().total, pool.stats().cached, pool.stats().evictions) == (4, 4, 0)


def test_shrinking_evicts_by_the_eviction_policy() -> None:
    pool = make_pool(6)
    store(pool, [1, 2, 3])
    store(pool, [4, 5, 6])
    pool.release(pool.acquire(pool.match(keys_of([1, 2, 3]))))
    assert pool.resize(4) == 4
    assert (pool.num_cached(keys_of([1, 2, 3])), pool.num_cached(keys_of([4, 5, 6]))) == (3, 1)


def test_shrinking_stops_at_a_block_in_use_until_it_is_free() -> None:
    pool = make_pool(8)
    first, *rest = sorted(pool.alloc_mem(8))
    pool.free_mem([first, *rest[:3], *rest[4:]])
    assert pool.resize(2) == 5
    assert pool.stats().free == 4
    assert pool.resize(3) == 5
    pool.free_mem(rest[3:4])
    assert pool.resize(2) == 2
    assert len(pool.alloc_mem(2)) == 2
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(1)


def test_moved_block_keeps_its_eviction_value() -> None:
    pool = make_pool(8, lambda use: use.depth)
    filler = pool.alloc_mem(4)
    store(pool, [1, 2])
    store(pool, [3])
    pool.free_mem(filler)
    assert pool.resize(3) == 3
    pool.alloc_mem(1)
    assert (pool.num_cached(keys_of([1, 2])), pool.num_cached(keys_of([3]))) == (2, 0)


def test_shrinking_does_not_move_a_leased_block() -> None:
    pool = make_pool(8)
    private = pool.alloc_mem(4)
    store(pool, [1, 2])
    pool.free_mem(private)
    with pool.acquire(pool.match(keys_of([1]))) as lease:
        (addr,) = lease.addrs
        assert pool.resize(1) == slot_of(addr) + 1
        assert pool.block(addr) == content(lease.keys[0])
        assert pool.num_cached(keys_of([1, 2])) == 2
    assert pool.resize(1) == 1
    assert pool.num_cached(keys_of([1, 2])) == 1


def test_pool_grows_at_most_to_the_maximum_of_its_arena() -> None:
    pool = make_pool(2, max_slots=5)
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(3)
    assert pool.resize(5) == 5
    assert len(pool.alloc_mem(5)) == 5
    for num_slots in (0, 6):
        with pytest.raises(ConfigError):
            pool.resize(num_slots)
    assert pool.stats().total == 5


def test_retiring_slots_are_not_allocated() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    store(pool, [3, 4])
    cache = pool._dram.cache
    cache.allocator.set_limit(2)  # as during a resize
    with pytest.raises(OutOfBlocks) as caught:
        pool.alloc_mem(3)
    assert (caught.value.free, caught.value.evictable) == (0, 2)
    assert pool.stats().cached == 4
    assert sorted(map(slot_of, pool.alloc_mem(2))) == [0, 1]


def test_shrinking_returns_memory_to_the_system() -> None:
    layout = KVLayout("pages", 1, 1, (Part(1, 4096),) * 2, "int8", 1)
    pool = MemPool(layout, Arena(layout.block_bytes, 32), Epoch(1 << 60))
    assert os.fstat(pool.arena.fd).st_blocks * 512 == 32 * layout.block_bytes
    pool.resize(8)
    assert os.fstat(pool.arena.fd).st_blocks * 512 == 8 * layout.block_bytes


def test_threads_use_the_pool_while_it_shrinks_and_grows() -> None:
    """Readers find the right bytes, and writers get slots that have memory."""
    pool = make_pool(64)
    prompts = [[first, *range(5)] for first in range(12)]
    done = threading.Event()
    failures: list[BaseException] = []

    def work(mine: int) -> None:
        turn = 0
        try:
            while not done.is_set():
                turn += 1
                prompt = prompts[(mine * 5 + turn) % len(prompts)]
                with pool.acquire(pool.match(keys_of(prompt))) as lease:
                    assert pool.verify(lease) == len(lease)
                    for key, addr in zip(lease.keys, lease.addrs, strict=True):
                        assert pool.block(addr) == content(key)
                try:
                    store(pool, prompt)
                except OutOfBlocks:
                    continue
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(150):
        wanted = (8, 64, 24, 40)[turn % 4]
        reached = pool.resize(wanted)
        assert wanted <= reached <= 64
        assert pool.stats().total == reached
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert pool.resize(8) == 8
    stats = pool.stats()
    assert (stats.private, stats.leases, stats.quarantined, stats.corruptions) == (0, 0, 0, 0)
    assert stats.free + stats.cached == stats.total == 8

"""MemPool: faults, edges and threads; test_pool_model.py has the contract."""

from __future__ import annotations

import dataclasses
import logging
import threading
from itertools import pairwise

import pytest

from memserve.core.block_addr import BlockAddr, Tier, slot_of, tag_of, tier_of
from memserve.core.errors import BlockStateError, ConfigError, OutOfBlocks
from memserve.core.ids import Epoch
from memserve.mempool.arena import Arena
from memserve.mempool.eviction import lfu
from memserve.mempool.pool import MemPool
from memserve.mempool.tier_pool import Checksum

from .harness import EPOCH, LAYOUT, content, keys_of, make_pool, store, write


def test_pool_counts_and_logs_a_flipped_byte_as_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(8)
    store(pool, [1, 2, 3, 4])
    keys = keys_of([1, 2, 3, 4])
    with caplog.at_level(logging.ERROR), pool.acquire(pool.match(keys)) as lease:
        pool.block(lease.addrs[2])[5] ^= 1
        assert pool.verify(lease) == 2
        assert pool.num_cached(keys) == 2
        assert pool.stats().quarantined == 2, "its reader still holds it"
    assert pool.stats().quarantined == 0
    assert pool.stats().corruptions == 1
    (record,) = caplog.records
    assert f"key={keys[2].hex()[:16]}" in record.getMessage()
    store(pool, [1, 2, 3, 4])
    with pool.acquire(pool.match(keys)) as lease:
        assert pool.verify(lease) == 4
        assert [pool.block(addr) for addr in lease.addrs] == [content(key) for key in keys]


def test_pool_counts_a_corrupt_block_with_two_readers_once() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    match = pool.match(keys_of([1, 2]))
    with pool.acquire(match) as first, pool.acquire(match) as second:
        pool.block(match.addrs[0])[0] ^= 0x80
        assert pool.verify(first) == pool.verify(second) == 0
        assert pool.stats().quarantined == 2
    assert pool.stats().corruptions == 1
    assert pool.stats().free == 4


def test_checksum_differs_between_layouts() -> None:
    other = dataclasses.replace(LAYOUT, model="other")
    assert Checksum(other).of(b"x" * 64) != Checksum(LAYOUT).of(b"x" * 64)


def test_pool_finds_bytes_written_after_the_seal_corrupt() -> None:
    pool = make_pool(2)
    addrs = write(pool, keys_of([1]))
    pool.block(addrs[0])[0] ^= 1
    pool.insert(keys_of([1]), addrs)
    with pool.acquire(pool.match(keys_of([1]))) as lease:
        assert pool.verify(lease) == 0


def test_pool_requires_a_new_seal_from_a_new_owner() -> None:
    pool = make_pool(1)
    pool.free_mem(write(pool, keys_of([1])))
    addrs = pool.alloc_mem(1)
    with pytest.raises(BlockStateError, match="not sealed"):
        pool.insert(keys_of([1]), addrs)


def test_out_of_blocks_reports_wanted_free_and_evictable_blocks() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    private = pool.alloc_mem(1)
    with pool.acquire(pool.match(keys_of([1]))), pytest.raises(OutOfBlocks) as caught:
        pool.alloc_mem(3)
    assert (caught.value.wanted, caught.value.free, caught.value.evictable) == (3, 1, 1)
    assert pool.num_cached(keys_of([1, 2])) == 2, "a refused allocation evicts nothing"
    pool.free_mem(private)
    assert len(pool.alloc_mem(4)) == 4


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_pool_refuses_foreign_addresses(num_blocks: int) -> None:
    pool = make_pool(4)
    addrs = pool.alloc_mem(num_blocks)
    stranger = MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 4), Epoch(EPOCH >> 1)).alloc_mem(1)
    beyond = [BlockAddr(addrs[0] + 4), BlockAddr(addrs[0] - 1 - slot_of(addrs[0]))]
    for addr in (*stranger, *beyond, BlockAddr(0), BlockAddr(-1), addrs[0]):
        for verb in (pool.free_mem, pool.seal):
            with pytest.raises(BlockStateError):
                verb([*addrs, addr])
    for addr in (*stranger, *beyond):
        with pytest.raises(BlockStateError):
            pool.block(addr)
    assert pool.stats().private == num_blocks
    pool.free_mem(addrs)
    with pytest.raises(BlockStateError):
        pool.free_mem(addrs)
    assert pool.stats().free == 4


def test_addresses_contain_tier_slot_and_epoch() -> None:
    addrs = make_pool(4).alloc_mem(4)
    assert sorted(map(slot_of, addrs)) == [0, 1, 2, 3]
    assert {tier_of(addr) for addr in addrs} == {Tier.DRAM}
    assert all(addr >> 34 == tag_of(EPOCH) for addr in addrs)
    assert all(0 <= addr < 1 << 63 for addr in addrs)


def test_pool_refuses_negative_numbers_of_blocks() -> None:
    pool = make_pool(1)
    for verb in (pool.alloc_mem, pool.reserve):
        with pytest.raises(BlockStateError):
            verb(-1)
    assert pool.stats().free == 1


def test_pool_evicts_used_blocks_last() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    store(pool, [3, 4])
    pool.release(pool.acquire(pool.match(keys_of([1, 2]))))
    pool.free_mem(pool.alloc_mem(2))
    assert (pool.num_cached(keys_of([1, 2])), pool.num_cached(keys_of([3, 4]))) == (2, 0)
    assert pool.stats().evictions == 2


def test_pool_evicts_a_block_after_its_lease_ended() -> None:
    pool = make_pool(2)
    store(pool, [1])
    with pool.acquire(pool.match(keys_of([1]))):
        store(pool, [2])
        pool.free_mem(pool.alloc_mem(1))
        assert pool.num_cached(keys_of([1])) == 1
    assert len(pool.alloc_mem(2)) == 2


def test_pool_evicts_a_block_whose_children_were_dropped() -> None:
    pool = make_pool(2)
    store(pool, [1, 2])
    with pool.acquire(pool.match(keys_of([1, 2]))) as lease:
        pool.block(lease.addrs[1])[0] ^= 1
        assert pool.verify(lease) == 1
    assert len(pool.alloc_mem(2)) == 2


def test_slot_does_not_inherit_the_eviction_value_of_its_last_block() -> None:
    pool = make_pool(2, lfu)
    store(pool, [1])
    for _ in range(9):
        pool.release(pool.acquire(pool.match(keys_of([1]))))
    store(pool, [4])
    pool.free_mem(pool.alloc_mem(1))  # updates the value of [1], and evicts [4]
    with pool.acquire(pool.match(keys_of([1]))) as lease:  # drops [1]
        pool.block(lease.addrs[0])[0] ^= 1
        assert pool.verify(lease) == 0
    store(pool, [2])  # in the slot that [1] had
    store(pool, [3])
    pool.release(pool.acquire(pool.match(keys_of([3]))))
    pool.free_mem(pool.alloc_mem(1))
    assert (pool.num_cached(keys_of([2])), pool.num_cached(keys_of([3]))) == (0, 1)


def test_head_of_a_chain_inherits_the_uses_of_its_evicted_tail() -> None:
    pool = make_pool(4, lfu)

    def use(prompt: list[int], times: int) -> None:
        for _ in range(times):
            pool.release(pool.acquire(pool.match(keys_of(prompt))))

    store(pool, [1, 2])
    store(pool, [3])
    store(pool, [4])
    use([1, 2], 3)
    use([3], 9)
    use([4], 9)
    pool.free_mem(pool.alloc_mem(1))
    assert pool.num_cached(keys_of([1, 2])) == 1
    store(pool, [5])
    use([5], 1)
    pool.free_mem(pool.alloc_mem(1))
    assert (pool.num_cached(keys_of([1])), pool.num_cached(keys_of([5]))) == (1, 0)


def test_only_acquire_counts_hits_and_misses() -> None:
    pool = make_pool(4)
    store(pool, [1, 2])
    match = pool.match(keys_of([1, 2, 3, 4, 5]))
    assert pool.stats().hits == pool.stats().misses == 0
    with pool.acquire(match) as lease:
        assert len(lease) == 2
    with pool.acquire(pool.match(keys_of([9]))) as lease:
        assert len(lease) == pool.verify(lease) == 0
    assert (pool.stats().hits, pool.stats().misses) == (2, 4)


def test_lease_ends_once_and_also_after_an_error() -> None:
    pool = make_pool(2)
    store(pool, [1])
    with pytest.raises(ZeroDivisionError), pool.acquire(pool.match(keys_of([1]))) as lease:
        raise ZeroDivisionError
    assert pool.stats().leases == 0
    with pytest.raises(BlockStateError):
        pool.release(lease)
    with pytest.raises(BlockStateError):
        make_pool(1).release(lease)


def test_quarantined_blocks_have_no_owner_until_the_reservation_is_settled() -> None:
    pool = make_pool(3)
    reservation = pool.reserve(2)
    pool.quarantine(reservation)
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(2)
    with pytest.raises(BlockStateError):
        pool.free_mem(reservation.addrs)
    pool.settle(reservation)
    assert len(pool.alloc_mem(3)) == 3


def test_committed_reservation_can_be_sealed_inserted_and_matched() -> None:
    pool = make_pool(2)
    reservation = pool.reserve(2)
    keys = keys_of([1, 2])
    for key, addr in zip(keys, reservation.addrs, strict=True):
        pool.block(addr)[:] = content(key)
    addrs = pool.commit(reservation)
    assert pool.seal(addrs) == [Checksum(LAYOUT).of(content(key)) for key in keys]
    assert pool.insert(keys, addrs).new == addrs
    with pytest.raises(BlockStateError):
        pool.settle(reservation)


def test_pool_refuses_a_tier_that_it_does_not_own() -> None:
    pool = make_pool(2)
    for verb in (lambda: pool.alloc_mem(1, Tier.HBM), lambda: pool.stats(Tier.REMOTE)):
        with pytest.raises(BlockStateError):
            verb()


def test_stats_by_tier_lists_the_nearest_tier_first() -> None:
    assert list(make_pool(2).stats_by_tier()) == [Tier.DRAM]
    pool = make_pool(2, hbm_slots=3)
    assert list(pool.stats_by_tier()) == [Tier.HBM, Tier.DRAM]
    assert [stats.total for stats in pool.stats_by_tier().values()] == [3, 2]


def test_free_mem_refuses_blocks_of_two_tiers() -> None:
    pool = make_pool(2, hbm_slots=2)
    far, near = pool.alloc_mem(1), pool.alloc_mem(1, Tier.HBM)
    for addrs in ([*far, *near], [*near, *far]):
        with pytest.raises(BlockStateError):
            pool.free_mem(addrs)
    pool.free_mem(far)
    pool.free_mem(near)


def test_insert_refuses_different_numbers_of_keys_and_blocks() -> None:
    pool = make_pool(2)
    with pytest.raises(BlockStateError, match="2 keys for 1"):
        pool.insert(keys_of([1, 2]), write(pool, keys_of([1])))


def test_pool_verbs_accept_empty_arguments() -> None:
    pool = make_pool(1)
    pool.free_mem(pool.alloc_mem(0))
    pool.seal([])
    assert not pool.insert([], []).new
    assert len(pool.match([])) == pool.num_cached([]) == pool.clear() == 0
    pool.cancel(pool.reserve(0))
    assert pool.snapshot().chains == ()


def test_pool_refuses_an_arena_with_another_block_size() -> None:
    with pytest.raises(ConfigError):
        MemPool(LAYOUT, Arena(LAYOUT.block_bytes + 1, 1), EPOCH)
    other = Arena(LAYOUT.block_bytes + 64, 1)
    with pytest.raises(ConfigError):
        MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 1), EPOCH, others={Tier.HBM: other})


def test_pool_stays_consistent_under_threads_that_overfill_it() -> None:
    """Readers verify blocks while writers evict; in the end every block is accounted for."""
    pool = make_pool(24)
    prompts = [[first, *range(5)] for first in range(8)]
    failures: list[BaseException] = []

    def work(mine: int) -> None:
        try:
            for turn in range(60):
                prompt = prompts[(mine * 3 + turn) % len(prompts)]
                with pool.acquire(pool.match(keys_of(prompt))) as lease:
                    assert pool.verify(lease) == len(lease)
                    for key, addr in zip(lease.keys, lease.addrs, strict=True):
                        assert pool.block(addr) == content(key)
                try:
                    store(pool, prompt)
                except OutOfBlocks:
                    continue
                if turn % 20 == 7:
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
    assert (stats.private, stats.leases, stats.quarantined, stats.corruptions) == (0, 0, 0, 0)
    assert stats.free + stats.cached == stats.total
    events = pool.take_events()
    assert [after.sequence - before.sequence for before, after in pairwise(events)] == [1] * (len(events) - 1)

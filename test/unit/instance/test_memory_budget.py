"""One budget of DRAM, shared by the layouts that come."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memserve.core.block_keys import BlockKey
from memserve.core.errors import ConfigError, OutOfBlocks, TransferTimeout
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.memory_budget import LayoutUsage, MemoryBudget
from memserve.mempool.eviction import EVICTION_POLICIES, EvictionName
from memserve.mempool.pool import MemPool
from memserve.testing.fake_clock import FakeClock

BLOCK = 4096
BUDGET = 12 * BLOCK


def layout(name: str, blocks: int = 1) -> KVLayout:
    """Blocks of `blocks` times 4096 bytes."""
    return KVLayout(name, blocks, 16, (Part(2, 16),) * 2, "float32", 4)


def fill(pool: MemPool, seed: int = 0) -> list[BlockKey]:
    """Cache as many blocks as there is room for, each a prompt of its own; their keys."""
    addrs = pool.alloc_mem(pool.stats().free)
    keys = [BlockKey(bytes([seed, i]) * 16) for i in range(len(addrs))]
    pool.seal(addrs)
    for key, addr in zip(keys, addrs, strict=True):
        pool.insert([key], [addr])
    return keys


class Stage:
    """Lent memory, and what was said of its pools' sizes."""

    def __init__(
        self, budget: int = BUDGET, step: int = BUDGET, fails: bool = False, max_layouts: int = 64
    ) -> None:
        self.resized: list[tuple[str, int]] = []
        self.fails = fails
        self.lent = MemoryBudget(
            budget, Epoch(1), on_resized=self._resized, step_bytes=step, max_layouts=max_layouts
        )

    def _resized(self, pool: MemPool) -> None:
        self.resized.append((pool.layout.model, pool.arena.num_slots))
        if self.fails:
            raise TransferTimeout("somebody", 1.0)

    def sizes(self) -> list[int]:
        return [pool.arena.num_slots for pool in self.lent.pools()]

    def used(self) -> int:
        return sum(pool.arena.num_slots * pool.arena.slot_bytes for pool in self.lent.pools())


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Stage]:
    def made(**settings: int) -> Stage:
        stage = Stage(**settings)
        request.addfinalizer(stage.lent.close)
        return stage

    return made


def test_memory_budget_takes_no_memory_before_the_first_layout(make: Callable[..., Stage]) -> None:
    stage = make()
    assert stage.lent.pools() == ()
    assert not stage.lent.balance()


def test_first_layout_gets_the_whole_budget_and_keeps_its_pool(make: Callable[..., Stage]) -> None:
    stage = make()
    pool = stage.lent.pool_of(layout("a"))
    assert pool.layout == layout("a")
    assert stage.lent.pool_of(layout("a")) is pool
    assert stage.sizes() == [12]
    assert not stage.lent.balance()


def test_layouts_share_equally_and_the_older_ones_evict(make: Callable[..., Stage]) -> None:
    stage = make()
    first = stage.lent.pool_of(layout("a"))
    fill(first)
    stage.lent.pool_of(layout("b"))
    assert stage.sizes() == [6, 6]
    assert first.stats().cached == 6
    assert stage.resized == [("a", 6)]
    stage.lent.pool_of(layout("c"))
    assert stage.sizes() == [4, 4, 4]
    assert stage.resized == [("a", 6), ("a", 4), ("b", 4)]
    assert stage.used() == BUDGET


def test_shares_of_layouts_are_equal_in_bytes(make: Callable[..., Stage]) -> None:
    stage = make()
    stage.lent.pool_of(layout("a"))
    stage.lent.pool_of(layout("b", blocks=4))
    assert stage.sizes() == [6, 1]
    assert stage.used() <= BUDGET


def test_leased_blocks_stay_until_they_are_released(make: Callable[..., Stage]) -> None:
    stage = make()
    first = stage.lent.pool_of(layout("a"))
    held = sorted(first.alloc_mem(12))
    first.free_mem(held[:9])  # 9 .. 11 are in the way
    with pytest.raises(OutOfBlocks):
        stage.lent.pool_of(layout("b"))
    assert stage.sizes() == [12]
    first.free_mem(held[9:])
    stage.lent.pool_of(layout("b"))
    assert stage.sizes() == [6, 6]


def test_new_pool_takes_the_free_budget_and_grows_later(make: Callable[..., Stage]) -> None:
    stage = make()
    first = stage.lent.pool_of(layout("a"))
    held = sorted(first.alloc_mem(12))
    first.free_mem(held[9:])  # 6 .. 8 are in the way
    stage.lent.pool_of(layout("b"))
    assert stage.sizes() == [9, 3]
    assert not stage.lent.balance()
    first.free_mem(held[:9])
    assert stage.lent.balance()
    assert stage.sizes() == [6, 6]
    assert stage.resized[-2:] == [("a", 6), ("b", 6)]
    assert not stage.lent.balance()


def test_a_large_pool_begins_small_and_doubles(make: Callable[..., Stage]) -> None:
    stage = make(step=2 * BLOCK)
    stage.lent.pool_of(layout("a"))
    grown = [stage.sizes()]
    while stage.lent.balance():
        grown.append(stage.sizes())
    assert grown == [[2], [4], [8], [12]]
    assert stage.resized == [("a", 4), ("a", 8), ("a", 12)]


@pytest.mark.parametrize(("name", "kept"), [("lru", 1), ("lfu", 0)])
def test_pools_evict_by_the_policy_they_were_given(name: EvictionName, kept: int) -> None:
    """Prompt 0 is used often, prompt 1 last."""
    lent = MemoryBudget(
        2 * BLOCK, Epoch(1), on_resized=lambda _: None, eviction=EVICTION_POLICIES[name], step_bytes=2 * BLOCK
    )
    pool = lent.pool_of(layout("a"))
    keys = fill(pool)
    for key in (*[keys[0]] * 5, keys[1]):
        pool.release(pool.acquire(pool.match([key])))
    pool.free_mem(pool.alloc_mem(1))
    assert [i for i, key in enumerate(keys) if pool.num_cached([key])] == [kept]
    lent.close()


def test_a_step_smaller_than_a_block_is_one_block(make: Callable[..., Stage]) -> None:
    stage = make(step=1)
    stage.lent.pool_of(layout("a", blocks=3))
    assert stage.sizes() == [1]
    assert stage.lent.balance()


def test_memory_budget_is_never_exceeded(make: Callable[..., Stage]) -> None:
    stage = make(budget=40 * BLOCK + 7, step=3 * BLOCK)
    for i, blocks in enumerate([1, 3, 2, 5, 1]):
        pool = stage.lent.pool_of(layout(str(i), blocks))
        fill(pool, i)
        while stage.lent.balance():
            assert stage.used() <= 40 * BLOCK
        assert all(size >= 1 for size in stage.sizes())


def test_unused_layout_gives_its_share_up_and_gets_it_back(make: Callable[..., Stage]) -> None:
    stage = make()
    first, second = stage.lent.pool_of(layout("a")), stage.lent.pool_of(layout("b"))
    fill(first)
    unused = {first.layout.digest}
    while stage.lent.balance(unused):
        assert stage.used() <= BUDGET
    assert stage.sizes() == [1, 11]
    assert stage.lent.pool_of(layout("a")) is first
    fill(second)
    while stage.lent.balance():
        assert stage.used() <= BUDGET
    assert stage.sizes() == [6, 6]
    assert (first.stats().cached, second.stats().cached) == (1, 6)


def test_new_layout_shares_with_used_layouts_only(make: Callable[..., Stage]) -> None:
    stage = make()
    first, second = stage.lent.pool_of(layout("a")), stage.lent.pool_of(layout("b"))
    stage.lent.balance({first.layout.digest})
    third = stage.lent.pool_of(layout("c"))
    stage.lent.balance({first.layout.digest})
    assert [pool.arena.num_slots for pool in (first, second, third)] == [1, 6, 5]
    stage.lent.balance({pool.layout.digest for pool in (first, second, third)})
    assert stage.sizes() == [1, 1, 1]


def test_a_block_larger_than_its_share_is_refused_and_changes_nothing(make: Callable[..., Stage]) -> None:
    stage = make()
    with pytest.raises(ConfigError, match="lend more"):
        stage.lent.pool_of(layout("huge", blocks=13))
    stage.lent.pool_of(layout("a", blocks=7))
    with pytest.raises(ConfigError, match="lend more"):
        stage.lent.pool_of(layout("b"))  # a's one block is more than half
    assert stage.sizes() == [1]


def test_one_layout_too_many_is_refused(make: Callable[..., Stage]) -> None:
    stage = make(max_layouts=2)
    stage.lent.pool_of(layout("a"))
    stage.lent.pool_of(layout("b"))
    with pytest.raises(ConfigError, match="2 layouts already"):
        stage.lent.pool_of(layout("c"))
    assert stage.sizes() == [6, 6]


def test_slow_release_by_a_peer_delays_no_pool(make: Callable[..., Stage]) -> None:
    stage = make(fails=True)
    stage.lent.pool_of(layout("a"))
    stage.lent.pool_of(layout("b"))
    assert stage.sizes() == [6, 6]


def test_a_layout_is_unused_when_no_member_has_had_it_for_long() -> None:
    clock, unused_s = FakeClock(), 600.0
    last_use = LayoutUsage(clock, unused_s)
    one, two = layout("a").digest, layout("b").digest
    assert last_use.unused([one, two], {one.hex()}) == set()
    clock.advance(unused_s)
    assert last_use.unused([one, two], {one.hex(), ""}) == set()
    clock.advance(1.0)
    assert last_use.unused([one, two], set()) == {two}
    assert last_use.unused([one, two], {two.hex()}) == set()
    clock.advance(unused_s)
    assert last_use.unused([one, two], set()) == {one}

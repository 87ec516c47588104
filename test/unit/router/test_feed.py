"""The router's tree follows what pools report: gaps, restarts, strangers and broken snapshots."""

from __future__ import annotations

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import Removed, Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.feed import TreeFeed
from memserve.router.pools import Pools
from memserve.router.prompt_tree import ClusterTree, Depth
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import (
    Done,
    PoolEvents,
    PoolInfo,
    Role,
    SnapshotPart,
    SnapshotWanted,
    Unknown,
)

DECODE = InstanceId("decode")
ONE, TWO = Epoch(1), Epoch(2)


def info(epoch: Epoch, name: InstanceId = DECODE) -> PoolInfo:
    return PoolInfo(name, epoch, Role.DECODE, CachingMode.FULL, f"127.0.0.1:{epoch}", "layout")


def chain(num_blocks: int, seed: int = 1) -> tuple[BlockKey, ...]:
    return tuple(page_keys([seed] * num_blocks, 1))


def stored(sequence: int, keys: tuple[BlockKey, ...], parent: BlockKey | None = None) -> Stored:
    return Stored(sequence, Tier.DRAM, parent, keys)


@pytest.fixture
def pools() -> Pools:
    pools = Pools(heartbeat_s=1.0, clock=FakeClock())
    pools.register(info(ONE))
    return pools


@pytest.fixture
def feed(pools: Pools) -> TreeFeed:
    return TreeFeed(ClusterTree(), pools)


def depth(feed: TreeFeed, keys: tuple[BlockKey, ...], name: InstanceId = DECODE) -> int:
    return feed.tree.depths(keys).get(name, Depth(0, 0)).total


def test_events_reach_the_tree(feed: TreeFeed) -> None:
    keys = chain(5)
    assert feed.events(PoolEvents(ONE, (stored(1, keys[:3]),))) == Done()
    assert feed.events(PoolEvents(ONE, (stored(2, keys[3:], keys[2]),))) == Done()
    assert depth(feed, keys) == 5
    assert feed.events(PoolEvents(ONE, (Removed(3, Tier.DRAM, keys[:3:-1]),))) == Done()
    assert depth(feed, keys) == 4


def test_a_gap_asks_for_a_snapshot_which_mends_it(feed: TreeFeed) -> None:
    keys = chain(6)
    feed.events(PoolEvents(ONE, (stored(1, keys[:2]),)))
    assert feed.events(PoolEvents(ONE, (stored(3, keys[4:], keys[3]),))) == SnapshotWanted()
    assert depth(feed, keys) == 2
    assert feed.part(SnapshotPart(ONE, 3, 0, False, (stored(0, keys[:4]),))) == Done()
    assert depth(feed, keys) == 2, "not before the last part"
    assert feed.part(SnapshotPart(ONE, 3, 1, True, (stored(0, keys[4:], keys[3]),))) == Done()
    assert depth(feed, keys) == 6
    assert feed.events(PoolEvents(ONE, (Removed(4, Tier.DRAM, keys[5:]),))) == Done()
    assert depth(feed, keys) == 5


@pytest.mark.parametrize(
    "parts",
    [
        [(3, 1, True)],
        [(3, 0, False), (3, 2, True)],
        [(3, 0, False), (4, 1, True)],
        [(3, 0, True), (3, 1, True)],
    ],
    ids=["no first", "one is missing", "of another snapshot", "after the last"],
)
def test_a_snapshot_in_the_wrong_parts_is_asked_for_again(
    feed: TreeFeed, parts: list[tuple[int, int, bool]]
) -> None:
    answers = [feed.part(SnapshotPart(ONE, *part, ())) for part in parts]
    assert answers == [Done()] * (len(parts) - 1) + [SnapshotWanted()]


def test_a_first_part_begins_anew(feed: TreeFeed) -> None:
    keys = chain(3)
    feed.part(SnapshotPart(ONE, 3, 0, False, (stored(0, chain(4, seed=9)),)))
    feed.part(SnapshotPart(ONE, 5, 0, True, (stored(0, keys),)))
    assert depth(feed, keys) == 3
    assert depth(feed, chain(4, seed=9)) == 0


def test_a_stranger_is_not_believed(feed: TreeFeed) -> None:
    keys = chain(3)
    assert feed.events(PoolEvents(TWO, (stored(1, keys),))) == Unknown()
    assert feed.part(SnapshotPart(TWO, 1, 0, True, (stored(0, keys),))) == Unknown()
    assert feed.tree.depths(keys) == {}


def test_what_a_pool_held_goes_with_it(feed: TreeFeed, pools: Pools) -> None:
    keys = chain(3)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    pools.deregister(ONE)
    assert feed.tree.depths(keys) == {}
    assert feed.events(PoolEvents(ONE, (stored(2, chain(2, seed=2)),))) == Unknown()


def test_a_new_life_begins_with_nothing(feed: TreeFeed, pools: Pools) -> None:
    keys = chain(3)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    pools.register(info(TWO))
    assert feed.tree.depths(keys) == {}
    assert feed.events(PoolEvents(ONE, (stored(2, keys),))) == Unknown()
    assert feed.events(PoolEvents(TWO, (stored(1, keys[:1]),))) == Done()
    assert depth(feed, keys) == 1

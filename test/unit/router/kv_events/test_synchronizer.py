"""TreeSynchronizer: gaps, restarts, unknown pools and broken snapshots."""

from __future__ import annotations

import pytest

from memserve.core.block_addr import Tier
from memserve.core.cache_events import Removed
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId, pool_name
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import MAX_LAYOUTS, TreeSynchronizer
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import Done, PoolEvents, PoolInfo, Role, SnapshotPart, SnapshotWanted, Unknown

from .sync_harness import AUDIT_S, ONE, TWO, chain, depth, info, stored


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pools(clock: FakeClock) -> Pools:
    pools = Pools(ClusterConfig(heartbeat_secs=1.0), clock)
    pools.register(info(ONE))
    return pools


@pytest.fixture
def feed(pools: Pools, clock: FakeClock) -> TreeSynchronizer:
    return TreeSynchronizer(GlobalPromptTree(clock=clock), pools, audit_s=AUDIT_S, clock=clock)


def test_events_reach_the_tree(feed: TreeSynchronizer) -> None:
    keys = chain(5)
    assert feed.events(PoolEvents(ONE, (stored(1, keys[:3]),))) == Done()
    assert feed.events(PoolEvents(ONE, (stored(2, keys[3:], keys[2]),))) == Done()
    assert depth(feed, keys) == 5
    assert feed.events(PoolEvents(ONE, (Removed(3, Tier.DRAM, keys[:3:-1]),))) == Done()
    assert depth(feed, keys) == 4


def test_gap_requests_a_snapshot_that_repairs_the_tree(feed: TreeSynchronizer) -> None:
    keys = chain(6)
    feed.events(PoolEvents(ONE, (stored(1, keys[:2]),)))
    assert feed.events(PoolEvents(ONE, (stored(3, keys[4:], keys[3]),))) == SnapshotWanted()
    assert depth(feed, keys) == 2
    assert feed.part(SnapshotPart(ONE, 3, 0, False, (stored(0, keys[:4]),))) == Done()
    assert depth(feed, keys) == 2, "the last part is missing"
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
def test_snapshot_with_wrong_parts_is_requested_again(
    feed: TreeSynchronizer, parts: list[tuple[int, int, bool]]
) -> None:
    answers = [feed.part(SnapshotPart(ONE, *part, ())) for part in parts]
    assert answers == [Done()] * (len(parts) - 1) + [SnapshotWanted()]


def test_first_part_restarts_the_snapshot(feed: TreeSynchronizer) -> None:
    keys = chain(3)
    feed.part(SnapshotPart(ONE, 3, 0, False, (stored(0, chain(4, seed=9)),)))
    feed.part(SnapshotPart(ONE, 5, 0, True, (stored(0, keys),)))
    assert depth(feed, keys) == 3
    assert depth(feed, chain(4, seed=9)) == 0


def test_messages_of_unknown_pools_are_rejected(feed: TreeSynchronizer) -> None:
    keys = chain(3)
    assert feed.events(PoolEvents(TWO, (stored(1, keys),))) == Unknown()
    assert feed.part(SnapshotPart(TWO, 1, 0, True, (stored(0, keys),))) == Unknown()
    assert feed.synced_tree().overlaps(keys) == {}


def test_blocks_of_a_pool_leave_with_the_pool(feed: TreeSynchronizer, pools: Pools) -> None:
    keys = chain(3)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    pools.deregister(ONE)
    assert feed.synced_tree().overlaps(keys) == {}
    assert feed.events(PoolEvents(ONE, (stored(2, chain(2, seed=2)),))) == Unknown()


def test_new_epoch_starts_without_blocks(feed: TreeSynchronizer, pools: Pools) -> None:
    keys = chain(3)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    pools.register(info(TWO))
    assert feed.synced_tree().overlaps(keys) == {}
    assert feed.events(PoolEvents(ONE, (stored(2, keys),))) == Unknown()
    assert feed.events(PoolEvents(TWO, (stored(1, keys[:1]),))) == Done()
    assert depth(feed, keys) == 1


def test_latest_epoch_of_an_instance_counts_whatever_happens_to_the_earlier(
    feed: TreeSynchronizer, pools: Pools
) -> None:
    """Another model under the same name: their pools do not replace each other."""
    keys = chain(3)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    pools.register(info(TWO, layout="another"))
    assert feed.events(PoolEvents(ONE, (stored(2, chain(2, seed=2)),))) == Unknown()
    assert feed.events(PoolEvents(TWO, (stored(1, keys[:2]),))) == Done()
    pools.deregister(ONE)
    assert depth(feed, keys) == 2
    assert feed.events(PoolEvents(TWO, (stored(2, keys[2:], keys[1]),))) == Done()


def test_only_rank_0_of_an_instance_counts(feed: TreeSynchronizer, pools: Pools) -> None:
    feed.events(PoolEvents(ONE, (stored(1, chain(3)),)))
    pools.register(info(TWO, layout="second half", rank=1))
    assert feed.events(PoolEvents(TWO, (stored(1, chain(1)),))) == Unknown()
    assert depth(feed, chain(3)) == 3


def test_empty_update_before_any_snapshot_requests_a_snapshot(feed: TreeSynchronizer) -> None:
    assert feed.events(PoolEvents(ONE, ())) == SnapshotWanted()
    assert feed.part(SnapshotPart(ONE, 7, 0, True, ())) == Done()
    assert feed.events(PoolEvents(ONE, ())) == Done()
    assert feed.events(PoolEvents(ONE, (stored(8, chain(2)),))) == Done()


def test_repeated_part_is_ignored(feed: TreeSynchronizer) -> None:
    keys = chain(6)
    for part in ((0, False, stored(0, keys[:4])), (1, False, stored(0, keys[4:5], keys[3]))):
        message = SnapshotPart(ONE, 3, *part[:2], part[2:])
        assert [feed.part(message), feed.part(message)] == [Done()] * 2
    last = SnapshotPart(ONE, 3, 2, True, (stored(0, keys[5:], keys[4]),))
    assert feed.part(last) == Done()
    feed.events(PoolEvents(ONE, (Removed(4, Tier.DRAM, keys[:1:-1]),)))
    assert feed.part(last) == Done()
    assert depth(feed, keys) == 2
    assert feed.synced_tree().stats().counters.resets == 1


def test_memory_instance_has_one_pool_per_layout_in_the_tree() -> None:
    clock = FakeClock()
    pools = Pools(ClusterConfig(heartbeat_secs=1), clock)
    feed = TreeSynchronizer(GlobalPromptTree(clock=clock), pools, clock=clock)
    memory, epoch = InstanceId("m"), Epoch(5)
    pools.register(PoolInfo(memory, epoch, Role.MEMORY, CachingMode.FULL, "127.0.0.1:5", ""))
    for layout, length in (("aa", 3), ("bb", 2)):
        parts = (stored(1, chain(length)),)
        assert isinstance(feed.part(SnapshotPart(epoch, 1, 0, True, parts, layout=layout)), Done)
        assert isinstance(feed.events(PoolEvents(epoch, (stored(2, chain(9, seed=2)),), layout)), Done)
    assert {name: depth(feed, chain(9), pool_name(memory, name)) for name in ("aa", "bb")} == {
        "aa": 3,
        "bb": 2,
    }
    assert depth(feed, chain(9), memory) == 0
    assert isinstance(feed.events(PoolEvents(epoch, (), "c" * 1000)), Unknown), "not the digest of a layout"
    for number in range(100):
        feed.part(SnapshotPart(epoch, 1, 0, True, (stored(1, chain(1)),), layout=f"{number:04}"))
    assert len(feed.synced_tree().overlaps(chain(1))) == MAX_LAYOUTS, "at most MAX_LAYOUTS layouts"
    pools.deregister(epoch)
    assert feed.synced_tree().overlaps(chain(9)) == {}

"""Audits of the prompt tree, and false messages of pools."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.scheduling.prompt_tree.tree import AuditResult, GlobalPromptTree
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import AuditWanted, Done, PoolEvents, SnapshotPart, SnapshotWanted, Unknown

from .sync_harness import AUDIT_S, DECODE, ONE, OTHER, THREE, TWO, audit, chain, depth, info, send, stored


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


def test_each_pool_is_audited_periodically(feed: TreeSynchronizer, clock: FakeClock) -> None:
    keys = chain(5)
    assert feed.events(PoolEvents(ONE, (stored(1, keys),))) == Done()
    assert feed.audit_results() == {}
    for _ in range(3):
        clock.advance(AUDIT_S - 1)
        assert feed.events(PoolEvents(ONE, ())) == Done()
        clock.advance(1)
        assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
        assert feed.events(PoolEvents(ONE, ())) == Done(), "an audit is requested once"
        assert send(feed, audit(ONE, 1, stored(0, keys[:2]), stored(0, keys[2:], keys[1]))) == {"Done"}
    assert feed.audit_results() == {DECODE: AuditResult(5, 5, 5, 0)}
    counters = feed.counters()
    assert (counters.audits_asked, counters.audits, counters.untrue_audits) == (3, 3, 0)
    assert feed.synced_tree().stats().counters.resets == 0, "no snapshot replaces a correct tree"


@pytest.mark.parametrize("is_heard", [True, False], ids=["", "and its answer is lost"])
def test_audit_that_finds_differences_requests_a_snapshot(
    feed: TreeSynchronizer, pools: Pools, clock: FakeClock, caplog: pytest.LogCaptureFixture, is_heard: bool
) -> None:
    keys, other = chain(5), chain(3, seed=2)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    truth = audit(ONE, 1, stored(0, keys[:2]), stored(0, other))
    assert [feed.part(one) for one in truth] == [Done(), SnapshotWanted()]
    assert feed.audit_results() == {DECODE: AuditResult(5, 5, 2, 0)}
    assert "phantoms=3 missing=3 of=5" in caplog.text
    if not is_heard:
        assert feed.part(truth[-1]) == Done()
        assert feed.events(PoolEvents(ONE, (stored(2, keys[:1]),))) == SnapshotWanted()
    snapshot = SnapshotPart(ONE, 2, 0, True, (stored(0, keys[:2]), stored(0, other)))
    assert feed.part(snapshot) == feed.events(PoolEvents(ONE, ())) == Done()
    assert (depth(feed, keys), depth(feed, other)) == (2, 3)
    counters = feed.counters()
    assert (counters.untrue_audits, counters.phantoms, feed.synced_tree().stats().counters.resets) == (
        1,
        3,
        1,
    )
    pools.deregister(ONE)
    assert feed.synced_tree().overlaps(keys) == feed.audit_results() == {}


@pytest.mark.parametrize("sequence", [0, 1, 3, 9])
def test_audit_at_another_sequence_has_no_result(
    feed: TreeSynchronizer, clock: FakeClock, sequence: int
) -> None:
    feed.events(PoolEvents(ONE, (stored(1, chain(5)), stored(2, chain(2, seed=2)))))
    clock.advance(AUDIT_S)
    feed.events(PoolEvents(ONE, ()))
    assert send(feed, audit(ONE, sequence, stored(0, chain(1)))) == {"Done"}
    assert feed.audit_results() == {}
    assert (feed.counters().void_audits, feed.counters().audits) == (1, 0)
    assert depth(feed, chain(5)) == 5


def test_audit_leaves_an_arriving_snapshot_alone_and_a_missing_part_ends_only_the_audit(
    feed: TreeSynchronizer, clock: FakeClock
) -> None:
    keys = chain(6)
    feed.events(PoolEvents(ONE, (stored(1, keys[:1]),)))
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    pieces = [stored(0, keys[i : i + 2], keys[i - 1] if i else None) for i in (0, 2, 4)]
    assert feed.part(SnapshotPart(ONE, 5, 0, False, (pieces[0],))) == Done()
    first, _, last = audit(ONE, 1, *pieces)
    assert send(feed, [first, last, last]) == {"Done"}
    assert feed.counters().void_audits == feed.counters().unasked_parts == 1
    assert feed.part(SnapshotPart(ONE, 5, 1, False, (pieces[1],))) == Done()
    assert feed.part(SnapshotPart(ONE, 5, 2, True, (pieces[2],))) == Done()
    assert depth(feed, keys) == 6
    assert feed.events(PoolEvents(ONE, (Removed(6, Tier.DRAM, keys[5:]),))) == Done()


def test_audit_parts_that_were_not_requested_are_ignored(feed: TreeSynchronizer) -> None:
    keys = chain(4)
    feed.events(PoolEvents(ONE, (stored(1, keys),)))
    assert send(feed, audit(ONE, 1, stored(0, chain(2, seed=3))) * 10) == {"Done"}
    assert feed.part(SnapshotPart(TWO, 1, 0, True, (), True)) == Unknown()
    assert depth(feed, keys) == 4
    assert feed.counters().unasked_parts == 10
    assert feed.audit_results() == {}


def test_large_pools_share_the_audit_bandwidth(
    feed: TreeSynchronizer, pools: Pools, clock: FakeClock
) -> None:
    blocks = 20 * (1 << 20) // 32 // 10
    pools.register(info(TWO, OTHER))
    large = chain(blocks)
    feed.events(PoolEvents(ONE, (stored(1, large),)))
    feed.events(PoolEvents(TWO, (stored(1, chain(1)),)))
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    send(feed, audit(ONE, 1, stored(0, large)))
    assert feed.audit_results()[DECODE].precision == 1
    clock.advance(1.9)
    assert feed.events(PoolEvents(TWO, ())) == Done(), "an audit of 2 MiB delays the next one by 2 s"
    clock.advance(0.2)
    assert feed.events(PoolEvents(TWO, ())) == AuditWanted()


def test_audit_ignores_blocks_forgotten_for_the_budget(pools: Pools, clock: FakeClock) -> None:
    feed = TreeSynchronizer(GlobalPromptTree(max_blocks=8, clock=clock), pools, audit_s=AUDIT_S, clock=clock)
    feed.events(PoolEvents(ONE, (stored(1, chain(6)), stored(2, chain(6, seed=2)))))
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    send(feed, audit(ONE, 2, stored(0, chain(6)), stored(0, chain(6, seed=2))))
    truth = feed.audit_results()[DECODE]
    assert (truth.phantoms, truth.recall) == (0, 8 / 12)
    assert feed.counters().untrue_audits == 0


# ---- false messages


@pytest.mark.parametrize("is_audit", [False, True])
def test_endless_snapshot_parts_take_no_more_memory_than_one_snapshot(
    pools: Pools, clock: FakeClock, is_audit: bool
) -> None:
    feed = TreeSynchronizer(GlobalPromptTree(), pools, audit_s=AUDIT_S, max_snapshot_blocks=100, clock=clock)
    feed.events(PoolEvents(ONE, (stored(1, chain(1)),)))
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    tracemalloc.start()
    try:
        for index in range(300):
            noise = random.Random(index)
            keys = tuple(BlockKey(noise.randbytes(32)) for _ in range(99))
            chains = (stored(0, keys), *[stored(0, ())] * 50)
            assert feed.part(SnapshotPart(ONE, 1, index, False, chains, is_audit)) == Done()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_beginning_of_a_too_large_snapshot_is_applied(pools: Pools, clock: FakeClock) -> None:
    feed = TreeSynchronizer(GlobalPromptTree(), pools, audit_s=AUDIT_S, max_snapshot_blocks=10, clock=clock)
    keys, other = chain(16), chain(4, seed=2)
    feed.part(SnapshotPart(ONE, 9, 0, False, (stored(0, keys[:8]),)))
    feed.part(SnapshotPart(ONE, 9, 1, True, (stored(0, keys[8:], keys[7]), stored(0, other))))
    assert (depth(feed, keys), depth(feed, other)) == (8, 0)
    assert feed.counters().left_out == 12
    assert feed.events(PoolEvents(ONE, (Removed(10, Tier.DRAM, keys[:6:-1]),))) == Done()
    assert depth(feed, keys) == 7
    clock.advance(AUDIT_S)
    assert feed.events(PoolEvents(ONE, ())) == AuditWanted()
    assert send(feed, audit(ONE, 10, stored(0, keys[:7]), stored(0, other))) == {"Done"}
    assert feed.audit_results()[DECODE].recall == 7 / 11, (
        "the snapshot would not fit again, so none is requested"
    )


@pytest.mark.parametrize("seed", range(20))
def test_false_messages_of_one_pool_spare_the_others_and_a_snapshot_corrects_them(
    pools: Pools, clock: FakeClock, seed: int
) -> None:
    """Messages are doubled, out of order, cut, contradictory, of unknown pools and of old epochs."""
    pools.register(info(TWO, OTHER))
    feed = TreeSynchronizer(
        GlobalPromptTree(clock=clock), pools, audit_s=2.0, max_snapshot_blocks=500, clock=clock
    )
    noise, honest = random.Random(seed), chain(7, seed=5)
    feed.events(PoolEvents(TWO, (stored(1, honest),)))
    prompts = [chain(9, seed=i) for i in range(4)] + [tuple(BlockKey(bytes([i])) for i in range(5))]

    def event() -> CacheEvent:
        keys = noise.choice(prompts)
        start, stop = sorted(noise.choices(range(10), k=2))
        piece = keys[start:stop] if noise.random() < 0.9 else keys[stop:start:-1]
        tier, sequence = noise.choice(list(Tier)), noise.randrange(12)
        if noise.random() < 0.3:
            return Removed(sequence, tier, piece)
        return Stored(sequence, tier, noise.choice([None, *noise.choice(prompts)]), piece)

    for _ in range(300):
        clock.advance(noise.random())
        some = tuple(event() for _ in range(noise.randrange(4)))
        epoch = noise.choice([ONE, ONE, ONE, THREE])
        if noise.random() < 0.5:
            answer = feed.events(PoolEvents(epoch, some))
        else:
            index, sequence = noise.choice([0, 0, 1, 2, -1, 1 << 40]), noise.choice([1, 1, 2, -5, 1 << 60])
            chains = tuple(one for one in some if isinstance(one, Stored))
            is_last, is_audit = noise.random() < 0.4, noise.random() < 0.5
            answer = feed.part(SnapshotPart(epoch, sequence, index, is_last, chains, is_audit))
        assert (answer == Unknown()) is (epoch == THREE)
        assert depth(feed, honest, OTHER) == 7
    pools.register(info(THREE))
    truth = tuple(stored(0, chain(6, seed=8)[:n]) for n in (2, 6))
    assert feed.part(SnapshotPart(THREE, 4, 0, True, truth)) == Done()
    assert feed.synced_tree().compare(DECODE, Snapshot(4, truth[1:])) == AuditResult(6, 6, 6, 0)

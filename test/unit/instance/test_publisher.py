"""What a pool's publisher says to a router, whatever happens on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import Snapshot, Stored
from memserve.core.ids import Epoch, new_epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.publisher import Publisher, ReportSource, parts
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.testing.cache_follower import CacheFollower
from memserve.testing.cluster import wait_for
from memserve.testing.faulty_link import Fault, Faults, FaultyLink, FaultyProxy
from memserve.wire.link import ControlClient, ControlServer
from memserve.wire.messages import Done, Message, PoolEvents, SnapshotPart, SnapshotWanted, Unknown

SOURCE = ReportSource(Epoch(7), list, lambda: Snapshot(0, ()))
LAYOUT = KVLayout("model", 1, 1, (Part(1, 4),) * 2, "float32", 4)


class Listener:
    """A router's end: follows one pool, and turns away as many messages as it is told to."""

    def __init__(self) -> None:
        self.follower = CacheFollower()
        self.in_step = False
        self.turn_away = 0
        self.num_snapshots = 0
        self._chains: list[Stored] = []
        self._lock = threading.Lock()

    def __call__(self, message: Message) -> Message:
        with self._lock:
            if self.turn_away:
                self.turn_away -= 1
                return Unknown()
            if isinstance(message, PoolEvents):
                applied = self.in_step and all(map(self.follower.apply, message.events))
                return Done() if applied else SnapshotWanted()
            assert isinstance(message, SnapshotPart)
            self._chains = [*(self._chains if message.index else ()), *message.chains]
            if message.is_last:
                self.follower.reset(Snapshot(message.sequence, tuple(self._chains)))
                self.in_step = True
                self.num_snapshots += 1
            return Done()

    def forget(self) -> None:
        """Restart: nothing is known."""
        with self._lock:
            self.follower, self.in_step = CacheFollower(), False

    def keys(self) -> set[BlockKey]:
        with self._lock:
            return {node.key for node in self.follower.tree.nodes()}


@pytest.fixture
def pool() -> Iterator[MemPool]:
    arena = Arena(LAYOUT.block_bytes, 64)
    yield MemPool(LAYOUT, arena, new_epoch())
    arena.close()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def publisher(pool: MemPool, listener: Listener) -> Iterator[Publisher]:
    server = ControlServer("127.0.0.1", 0, listener)
    publisher = Publisher(
        ControlClient(server.address), ReportSource(Epoch(1), pool.take_events, pool.snapshot)
    )
    yield publisher
    publisher.close()
    server.close()


def store(pool: MemPool, num_blocks: int) -> list[BlockKey]:
    keys = page_keys(list(os.urandom(num_blocks)), 1)
    addrs = pool.alloc_mem(num_blocks)
    pool.seal(addrs)
    pool.insert(keys, addrs)
    return keys


def wait_told(pool: MemPool, listener: Listener) -> None:
    def is_told() -> bool:
        return {key for chain in pool.snapshot().chains for key in chain.keys} == listener.keys()

    wait_for(is_told, what="the news to arrive", timeout_s=10)


def test_publisher_sends_events(pool: MemPool, listener: Listener, publisher: Publisher) -> None:
    store(pool, 5)
    wait_told(pool, listener)
    pool.clear()
    store(pool, 60)
    store(pool, 60)
    wait_told(pool, listener)


def test_publisher_sends_a_snapshot_to_a_restarted_router(
    pool: MemPool, listener: Listener, publisher: Publisher
) -> None:
    store(pool, 5)
    wait_told(pool, listener)
    listener.forget()
    store(pool, 3)
    wait_told(pool, listener)
    assert listener.num_snapshots >= 2


def test_refused_report_is_repeated(pool: MemPool, listener: Listener, publisher: Publisher) -> None:
    store(pool, 5)
    wait_told(pool, listener)
    listener.turn_away = 2
    store(pool, 3)
    wait_told(pool, listener)
    assert listener.turn_away == 0


def test_lost_report_is_repeated_without_a_snapshot(pool: MemPool, listener: Listener) -> None:
    server, faults = ControlServer("127.0.0.1", 0, listener), Faults()
    with FaultyProxy(FaultyLink(ControlClient(server.address), faults)) as proxy:
        store(pool, 50)
        faults.expect(SnapshotPart, Fault.LOSE_ANSWER)
        publisher = Publisher(
            ControlClient(proxy.address), ReportSource(Epoch(1), pool.take_events, pool.snapshot)
        )
        for fault in (Fault.LOSE_ANSWER, Fault.LOSE_REQUEST, Fault.DOUBLE, Fault.DELAY):
            wait_told(pool, listener)
            faults.expect(PoolEvents, fault)
            store(pool, 30)
        wait_told(pool, listener)
        faults.land()
        store(pool, 30)
        wait_told(pool, listener)
        publisher.close()
    server.close()
    assert listener.num_snapshots == 2, "the one whose answer was lost came twice"


def test_a_snapshot_comes_in_parts_with_every_parent_before_its_children() -> None:
    keys = tuple(page_keys(list(range(10)), 1))
    other = tuple(page_keys(list(range(20, 23)), 1))
    chains = (Stored(0, Tier.DRAM, None, keys), Stored(0, Tier.HBM, None, other))
    for max_keys in range(1, 15):
        sent = list(parts(SOURCE, Snapshot(4, chains), max_keys))
        assert [part.index for part in sent] == list(range(len(sent)))
        assert [part.is_last for part in sent] == [False] * (len(sent) - 1) + [True]
        assert max(sum(len(chain.keys) for chain in part.chains) for part in sent) <= max_keys
        known: dict[Tier, list[BlockKey]] = {Tier.DRAM: [], Tier.HBM: []}
        for chain in (chain for part in sent for chain in part.chains):
            before = known[chain.tier]
            assert chain.parent == (before[-1] if before else None)
            before += chain.keys
        assert (tuple(known[Tier.DRAM]), tuple(known[Tier.HBM])) == (keys, other)


def test_an_empty_snapshot_is_one_part() -> None:
    assert list(parts(SOURCE, Snapshot(4, ()), 100)) == [SnapshotPart(Epoch(7), 4, 0, True, ())]

"""Who is about to go sends what it holds to others: what they lack, hottest first, where there is room."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing

import pytest

from memserve.core.block_keys import BlockKey
from memserve.core.errors import InstanceLost, PeerDeclined
from memserve.core.ids import Epoch
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.evacuation import LATE, NO_PEER, NO_ROOM, EvacuationRun
from memserve.mempool.remote.records import Pushed
from memserve.peering.remote_process import PeerAddress
from memserve.testing.fake_clock import FakeClock
from memserve.wire.link import ControlClient
from memserve.wire.peer_messages import Evacuate, Evacuated, EvacuationTarget, Located

from ..harness import LAYOUT, keys_of, make_pool, store
from .pair import TIMEOUT_S, End, once, running, start

ONE, OTHER, THIRD = [1, 2, 3, 4], [1, 2, 7, 8], [5, 6]


class FakePeers:
    """Other pools in this process; a push of what is new takes a second, and inserts what it should."""

    def __init__(self, **pools: MemPool) -> None:
        self.pools = pools
        self.lost: set[str] = set()
        self.clock = FakeClock()
        self.pushed: list[tuple[str, int]] = []

    def targets(self) -> list[EvacuationTarget]:
        return [EvacuationTarget(name, name, Epoch(1)) for name in self.pools]

    def room(self, peer: PeerAddress, pool: MemPool, keys: Sequence[BlockKey]) -> Located:
        if peer.control in self.lost:
            raise InstanceLost(peer.control, "gone")
        there = self.pools[peer.control]
        stats = there.stats()
        return Located(there.num_cached(keys), stats.free, stats.evictable)

    def transfer_with_insert(
        self,
        instance: PeerAddress,
        pool: MemPool,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey | None = None,
    ) -> Pushed:
        there = self.pools[instance.control]
        if parent is not None and not there.num_cached([parent]):
            raise PeerDeclined(instance.control, "its parent is not here", parent_unknown=True)
        if there.num_cached(keys) == len(keys):
            there.release(there.acquire(there.match(keys)))
            return Pushed(len(keys))
        self.clock.advance(1.0)
        self.pushed.append((instance.control, len(keys)))
        addrs = there.alloc_mem(len(keys))
        there.seal(addrs)
        inserted = there.insert(keys, addrs, parent)
        there.free_mem([*inserted.duplicates, *inserted.orphans])
        return Pushed(len(inserted.duplicates), len(inserted.new), 10 * len(inserted.new))

    def take_in(self, pool: MemPool, timeout_s: float = 100.0) -> Evacuated:
        return EvacuationRun(self, pool, self.targets(), self.clock).run(timeout_s)


def full(*prompts: Sequence[int], num_slots: int = 16) -> MemPool:
    pool = make_pool(num_slots)
    for prompt in prompts:
        store(pool, prompt)
    return pool


def holds(pool: MemPool, prompt: Sequence[int]) -> int:
    return pool.num_cached(keys_of(prompt))


def test_evacuation_saves_all_blocks_and_sends_shared_ones_once() -> None:
    pool, there = full(ONE, OTHER, THIRD), make_pool(16)
    assert FakePeers(a=there).take_in(pool) == Evacuated(8, 80, 0, 0)
    assert [holds(there, prompt) for prompt in (ONE, OTHER, THIRD)] == [4, 4, 2]
    assert pool.stats().cached == 8


def test_evacuation_sends_no_blocks_that_a_target_has() -> None:
    peers = FakePeers(a=full(ONE), b=full(THIRD))
    assert peers.take_in(full(ONE, THIRD)) == Evacuated(0, 0, 6, 0)
    assert not peers.pushed


def test_evacuation_sends_a_chain_to_the_target_that_has_most_of_it() -> None:
    peers = FakePeers(a=full(THIRD), b=full(ONE[:3]), c=full(ONE[:1]))
    assert peers.take_in(full(ONE)) == Evacuated(1, 10, 3, 0)
    assert peers.pushed == [("b", 1)]


def test_evacuation_sends_the_most_recent_chains_until_the_deadline() -> None:
    pool, there = full(ONE, THIRD, OTHER), make_pool(16)
    with pool.acquire(pool.match(keys_of(ONE[:3]))):
        pass
    answer = FakePeers(a=there).take_in(pool, timeout_s=1.5)
    assert answer == Evacuated(5, 50, 0, 3, LATE)
    assert [holds(there, prompt) for prompt in (ONE, OTHER, THIRD)] == [3, 4, 0]


def test_full_target_evicts_its_coldest_share_only() -> None:
    """Two pools as busy as each other: half of what both hold stays, the hotter half of each."""
    there = full([11, 12], [13, 14], num_slots=4)
    answer = FakePeers(a=there).take_in(full([21, 22], [23, 24]))
    assert answer == Evacuated(2, 20, 0, 2, NO_ROOM)
    assert [holds(there, prompt) for prompt in ([11, 12], [13, 14], [21, 22], [23, 24])] == [0, 2, 0, 2]


def test_evacuation_keeps_the_recency_of_chains() -> None:
    pool, there = full([21, 22], [23, 24], [25, 26]), make_pool(6)
    assert FakePeers(a=there).take_in(pool).num_left == 0
    for left in ([2, 2, 0], [2, 0, 0]):
        there.free_mem(there.alloc_mem(2 * left.count(0)))
        assert [holds(there, prompt) for prompt in ([25, 26], [23, 24], [21, 22])] == left


def test_evacuation_cuts_a_chain_that_exceeds_the_targets_room() -> None:
    there = make_pool(3)
    assert FakePeers(a=there).take_in(full(ONE)) == Evacuated(3, 30, 0, 1, NO_ROOM)
    assert holds(there, ONE) == 3


def test_evacuation_prefers_a_target_with_room_to_one_with_the_beginning() -> None:
    peers = FakePeers(a=full(ONE[:1], num_slots=2), b=make_pool(16))
    assert peers.take_in(full(ONE)).num_left == 0
    assert holds(peers.pools["b"], ONE) == 4


def test_evacuation_of_all_ranks_chooses_alike_and_spreads_prompts() -> None:
    def chosen(names: str) -> list[str]:
        peers = FakePeers(**{name: make_pool(64) for name in names})
        peers.take_in(full(*([token] for token in range(16))))
        return [next(name for name, pool in peers.pools.items() if holds(pool, [t])) for t in range(16)]

    assert chosen("abc") == chosen("cba")
    assert set(chosen("abc")) == set("abc")


def test_evacuation_continues_without_a_target_that_is_gone() -> None:
    peers = FakePeers(a=make_pool(16), b=make_pool(16))
    peers.lost = {"a"}
    assert peers.take_in(full(ONE, OTHER, THIRD)).num_left == 0
    peers.lost = {"a", "b"}
    assert peers.take_in(full(ONE)) == Evacuated(0, 0, 0, 4, NO_PEER)


def test_evacuation_of_an_empty_pool_ends_at_once() -> None:
    assert FakePeers().take_in(make_pool(4)) == Evacuated(0, 0, 0, 0)


# ---- over real sockets


@pytest.fixture
def ends() -> tuple[End, End]:
    return start(), start()


def evacuate(to: End, timeout_s: float = TIMEOUT_S) -> Evacuate:
    return Evacuate(LAYOUT.digest, (EvacuationTarget("there", to.peer.control, to.peer.epoch),), timeout_s)


def test_router_can_direct_an_evacuation(ends: tuple[End, End]) -> None:
    here, there = ends
    with running(*ends), closing(ControlClient(here.peer.control)) as router:
        assert "no pool" in getattr(router.request(evacuate(there), timeout_s=TIMEOUT_S), "reason", "")
        here.peers.add(here.pool)
        for prompt in (ONE, OTHER):
            store(here.pool, prompt)
        answer = router.request(evacuate(there), timeout_s=TIMEOUT_S)
        assert answer == Evacuated(6, 6 * LAYOUT.block_bytes, 0, 0)
        assert (there.has(ONE), there.has(OTHER)) == (4, 4)
        answer = router.request(evacuate(there), timeout_s=TIMEOUT_S)
        assert answer == Evacuated(0, 0, 6, 0)


def test_close_ends_a_running_evacuation(ends: tuple[End, End]) -> None:
    here, there = ends
    here.peers.add(here.pool)
    for token in range(8):
        store(here.pool, [token])
    closed = threading.Event()

    def close() -> None:
        threading.Thread(target=lambda: (here.peers.close(), closed.set())).start()

    with running(*ends), closing(ControlClient(here.peer.control)) as router:
        once(here.hooks, "before_copy", close)
        with pytest.raises(InstanceLost):
            router.request(evacuate(there, timeout_s=3600.0), timeout_s=0.5)
        assert closed.wait(TIMEOUT_S)

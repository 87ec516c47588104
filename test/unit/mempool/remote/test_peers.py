"""Blocks that go from one pool to another, and what their owners are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from memserve.core.errors import (
    ConfigError,
    LayoutMismatch,
    OutOfBlocks,
    PeerDeclined,
    StaleEpoch,
)
from memserve.core.ids import Epoch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.records import Pushed
from memserve.mempool.remote.sender import chunk_blocks
from memserve.peering.remote_process import PeerAddress
from memserve.transport.registry import TransportConfig
from memserve.wire.link import ControlClient
from memserve.wire.peer_messages import Fetch, Fetched, Locate, Located

from ..harness import EPOCH, LAYOUT, keys_of, make_pool, store
from .pair import TIMEOUT_S, End, running, start

PROMPT = [1, 2, 3, 4]
BLOCK_BYTES = LAYOUT.block_bytes
MAX_CHUNK_BLOCKS = chunk_blocks(1)


@pytest.fixture(params=["tcp", "local"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    ends = start(TransportConfig(request.param)), start(TransportConfig(request.param))
    with running(*ends):
        yield ends


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    ends = start(), start()
    with running(*ends):
        yield ends


def test_transfer_with_insert_sends_the_blocks_that_the_peer_lacks(pair: tuple[End, End]) -> None:
    here, there = pair
    store(here.pool, PROMPT)
    store(there.pool, PROMPT[:1])
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)) == Pushed(
        1, 3, 3 * BLOCK_BYTES
    )
    assert there.has(PROMPT) == 4
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)) == Pushed(4, 0, 0)
    stats = here.peers.stats()
    assert (stats.pushes, stats.blocks_pushed, stats.bytes_pushed) == (2, 3, 3 * BLOCK_BYTES)
    assert there.peers.stats().blocks_received == 3


@pytest.mark.parametrize("mode", TransferMode)
def test_transfer_with_insert_moves_blocks_in_every_mode(ends: tuple[End, End], mode: TransferMode) -> None:
    here, there = ends
    store(here.pool, PROMPT)
    store(there.pool, PROMPT[:1])
    pushed = here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT), mode=mode)
    assert pushed == Pushed(1, 3, 3 * BLOCK_BYTES)
    assert there.has(PROMPT) == 4


def test_fetch_copies_the_blocks_that_this_pool_lacks(pair: tuple[End, End]) -> None:
    here, there = pair
    store(there.pool, PROMPT)
    store(here.pool, PROMPT[:2])
    assert here.peers.fetch(there.peer, here.pool, keys_of([*PROMPT, 9]), timeout_s=TIMEOUT_S) == 4
    assert here.has(PROMPT) == 4
    assert here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 4
    stats = here.peers.stats()
    assert (stats.fetches, stats.blocks_fetched, stats.bytes_fetched) == (2, 2, 2 * BLOCK_BYTES)


def test_chain_continues_after_its_parent(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT)
    keys = keys_of(PROMPT)
    with pytest.raises(PeerDeclined) as caught:
        here.peers.transfer_with_insert(there.peer, here.pool, keys[2:], parent=keys[1])
    assert caught.value.parent_unknown
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys[:2]).num_sent == 2
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys[2:], parent=keys[1]).num_sent == 2
    assert there.has(PROMPT) == 4
    here.pool.clear()
    assert here.peers.fetch(there.peer, here.pool, keys[2:], parent=keys[1], timeout_s=TIMEOUT_S) == 0
    assert here.peers.fetch(there.peer, here.pool, keys[:2], timeout_s=TIMEOUT_S) == 2
    assert here.peers.fetch(there.peer, here.pool, keys[2:], parent=keys[1], timeout_s=TIMEOUT_S) == 2
    assert here.has(PROMPT) == 4


def test_transfer_with_insert_ends_at_the_first_block_that_is_not_cached(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT[:2])
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_sent == 2
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of([9])) == Pushed()
    assert there.has(PROMPT) == 2


def test_long_chains_go_in_chunks_both_ways() -> None:
    prompt = list(range(2 * MAX_CHUNK_BLOCKS + 5))
    here, there = start(pool=make_pool(200)), start(pool=make_pool(200))
    with running(here, there):
        store(here.pool, prompt)
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(prompt)).num_sent == len(prompt)
        assert there.has(prompt) == len(prompt)
        here.pool.clear()
        assert here.peers.fetch(there.peer, here.pool, keys_of(prompt), timeout_s=TIMEOUT_S) == len(prompt)
        assert here.has(prompt) == len(prompt)


def test_chunks_are_bounded_in_blocks_and_bytes() -> None:
    assert chunk_blocks(1) == MAX_CHUNK_BLOCKS == 64
    assert chunk_blocks(1 << 20) == 8
    assert chunk_blocks(1 << 30) == 1


def test_full_receiver_declines_and_accepts_after_blocks_are_freed(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT)
    taken = there.pool.alloc_mem(10)
    with pytest.raises(PeerDeclined, match="4 blocks wanted, 2 free") as caught:
        here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
    assert not caught.value.parent_unknown
    assert there.peers.stats().declined == 1
    there.pool.free_mem(taken)
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_sent == 4


def test_a_long_chain_is_cut_where_the_receiver_is_full() -> None:
    prompt = list(range(MAX_CHUNK_BLOCKS + 5))
    here, there = start(pool=make_pool(100)), start(pool=make_pool(MAX_CHUNK_BLOCKS + 2))
    with running(here, there):
        store(here.pool, prompt)
        assert (
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(prompt)).num_sent
            == MAX_CHUNK_BLOCKS
        )
        assert there.has(prompt) == MAX_CHUNK_BLOCKS


def test_fetch_into_a_full_pool_raises_and_releases_the_lease(ends: tuple[End, End]) -> None:
    here, there = ends
    store(there.pool, PROMPT)
    taken = here.pool.alloc_mem(10)
    with pytest.raises(OutOfBlocks):
        here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S)
    there.assert_clean()
    here.pool.free_mem(taken)
    assert here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 4


def test_receiver_does_not_evict_the_parent_of_incoming_blocks(ends: tuple[End, End]) -> None:
    here, there = ends
    prompt = list(range(12))
    store(here.pool, prompt)
    store(there.pool, prompt[:2])
    store(there.pool, [100 + i for i in range(10)])
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(prompt)).num_sent == 10
    assert there.has(prompt) == 12


def test_room_counts_what_the_peer_holds(ends: tuple[End, End]) -> None:
    here, there = ends
    store(there.pool, PROMPT)
    keys = keys_of([*PROMPT, 9])
    located = here.peers.room(there.peer, here.pool, keys)
    assert (located.num_blocks, located.num_free, located.num_evictable) == (4, 8, 4)
    other = replace(LAYOUT, model="another")
    with closing(ControlClient(there.peer.control)) as client:
        assert client.request(Locate(other.digest, tuple(keys)), timeout_s=TIMEOUT_S) == Located(0)


def test_another_layout_is_refused_with_each_difference() -> None:
    layout = replace(LAYOUT, page_tokens=2, dtype="bfloat16", dtype_bytes=2)
    other = MemPool(layout, Arena(layout.block_bytes, 4), EPOCH)
    here, there = start(pool=other), start()
    with running(here, there):
        store(there.pool, PROMPT)
        with pytest.raises(LayoutMismatch, match="page_tokens 1 here, 2 there; dtype float32 here, bfloat16"):
            here.peers.fetch(there.peer, other, keys_of(PROMPT), timeout_s=TIMEOUT_S)


def test_an_old_epoch_is_refused(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT)
    stale = PeerAddress(there.peer.control, Epoch(there.peer.epoch ^ 2))
    with pytest.raises(StaleEpoch):
        here.peers.transfer_with_insert(stale, here.pool, keys_of(PROMPT))
    with pytest.raises(StaleEpoch):
        here.peers.fetch(stale, here.pool, keys_of([9]), timeout_s=TIMEOUT_S)
    assert there.has(PROMPT) == 0
    assert here.peers.stats().failures == 2


def test_making_a_pool_does_not_hold_up_the_control_thread() -> None:
    is_making, may_go_on = threading.Event(), threading.Event()

    def make() -> None:
        is_making.set()
        assert may_go_on.wait(TIMEOUT_S)

    here, there = start(), start(before_pool_of=make)
    with running(here, there), ThreadPoolExecutor(1) as threads:
        store(here.pool, PROMPT)
        pushed = threads.submit(here.peers.transfer_with_insert, there.peer, here.pool, keys_of(PROMPT))
        assert is_making.wait(TIMEOUT_S)
        with closing(ControlClient(there.peer.control)) as client:
            answer = client.request(Locate(LAYOUT.digest, tuple(keys_of(PROMPT))), timeout_s=TIMEOUT_S)
        assert answer == Located(0)
        may_go_on.set()
        assert pushed.result(TIMEOUT_S).num_sent == 4


# ---- what a router asks for


def fetch_of(holder: End, prompt: list[int]) -> Fetch:
    keys = tuple(keys_of(prompt))
    return Fetch(LAYOUT.digest, keys, None, holder.peer.control, holder.peer.epoch, TIMEOUT_S)


def test_router_can_direct_a_fetch(ends: tuple[End, End]) -> None:
    here, there = ends
    here.peers.add(here.pool)
    store(there.pool, PROMPT)
    with closing(ControlClient(here.peer.control)) as router:
        assert router.request(fetch_of(there, PROMPT), timeout_s=TIMEOUT_S) == Fetched(4)
        answer = router.request(fetch_of(there, [*PROMPT, 9]), timeout_s=TIMEOUT_S)
        assert answer == Fetched(4, "the holder has no more of it")
    assert here.has(PROMPT) == 4


def test_failed_fetch_is_answered_with_the_reason(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT[:1])
    with closing(ControlClient(here.peer.control)) as router:
        answer = router.request(fetch_of(there, PROMPT), timeout_s=TIMEOUT_S)
        assert answer == Fetched(0, "there is no pool of such blocks here")
        here.peers.add(here.pool)
        stale = PeerAddress(there.peer.control, Epoch(1))
        there.peer = stale
        answer = router.request(fetch_of(there, PROMPT), timeout_s=TIMEOUT_S)
        assert isinstance(answer, Fetched)
        assert answer.num_blocks == 1
        assert "epoch" in answer.reason


def test_many_fetches_do_not_hold_up_the_control_thread() -> None:
    here, there = start(pool=make_pool(40)), start()  # Each of those that run has room of its own.
    client = ControlClient(here.peer.control)
    with running(here, there), ThreadPoolExecutor(8) as threads, closing(client):
        here.peers.add(here.pool)
        store(there.pool, PROMPT)

        def ask(_: int) -> object:
            with closing(ControlClient(here.peer.control)) as router:
                return router.request(fetch_of(there, PROMPT), timeout_s=TIMEOUT_S)

        answers = threads.map(ask, range(8))
        for _ in range(20):
            located = client.request(Locate(LAYOUT.digest, tuple(keys_of(PROMPT))), timeout_s=TIMEOUT_S)
            assert isinstance(located, Located)
        assert list(answers) == [Fetched(4)] * 8


# ---- one's own life


def test_a_resized_arena_is_named_anew(ends: tuple[End, End]) -> None:
    here, there = ends
    store(here.pool, PROMPT)
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT[:1])).num_sent == 1
    there.peers.resized(there.pool)
    here.peers.resized(here.pool)
    assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)) == Pushed(
        1, 3, 3 * BLOCK_BYTES
    )
    store(there.pool, [5, 6])
    there.peers.resized(there.pool)
    assert here.peers.fetch(there.peer, here.pool, keys_of([5, 6]), timeout_s=TIMEOUT_S) == 2
    assert there.has(PROMPT) == 4


def test_closed_peers_decline(ends: tuple[End, End]) -> None:
    here, there = ends
    here.peers.close()
    here.peers.close()
    with pytest.raises(PeerDeclined, match="closed"):
        here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))


@pytest.mark.parametrize("change", [{"timeout_s": 0.0}, {"lease_s": -1.0}, {"max_fetches": 0}])
def test_peers_config_refuses_limits_that_are_not_positive(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PeersConfig(**change)


def test_busy_control_port_is_a_config_error(ends: tuple[End, End]) -> None:
    port = int(ends[0].peer.control.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=str(port)):
        start(TransportConfig("tcp", control_port=port))

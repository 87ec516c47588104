"""The paper's verbs on a peer's pool: blocks that need not be cached at either end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memserve.core.errors import BlockStateError, PeerDeclined
from memserve.core.kv_layout import TransferMode
from memserve.mempool.remote.records import Pushed

from ..harness import LAYOUT, content, keys_of, store, write
from .pair import TIMEOUT_S, End, running, start

PROMPT = [1, 2, 3, 4]
BLOCK_BYTES = LAYOUT.block_bytes


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    ends = start(), start()
    with running(*ends):
        yield ends


@pytest.mark.parametrize("mode", TransferMode)
def test_transfer_leaves_blocks_to_be_claimed(ends: tuple[End, End], mode: TransferMode) -> None:
    here, there = ends
    keys = keys_of(PROMPT)
    src = write(here.pool, keys)
    pushed = here.peers.transfer(here.pool, there.peer, src, None, mode).result(TIMEOUT_S)
    assert (pushed.num_sent, pushed.num_bytes) == (4, 4 * BLOCK_BYTES)
    assert there.has(PROMPT) == 0
    there.peers.claim(there.pool, pushed.addrs)
    assert [bytes(there.pool.block(addr)) for addr in pushed.addrs] == [content(key) for key in keys]
    with pytest.raises(BlockStateError):
        there.peers.claim(there.pool, pushed.addrs)
    there.pool.free_mem(pushed.addrs)
    here.pool.free_mem(src)


@pytest.mark.parametrize("mode", TransferMode)
def test_transfer_with_insert_indexes_them(ends: tuple[End, End], mode: TransferMode) -> None:
    here, there = ends
    src = write(here.pool, keys_of(PROMPT))
    store(there.pool, PROMPT[:1])
    ticket = here.peers.transfer_with_insert(here.pool, there.peer, keys_of(PROMPT), src, None, mode)
    assert ticket.result(TIMEOUT_S) == Pushed(1, 3, 3 * BLOCK_BYTES)
    assert ticket.done()
    assert there.has(PROMPT) == 4
    here.pool.free_mem(src)


def test_a_reservation_is_filled_in_parts_and_committed(ends: tuple[End, End]) -> None:
    here, there = ends
    keys = keys_of(PROMPT)
    src = write(here.pool, keys)
    reservation = here.peers.reserve(here.pool, there.peer, 4)
    assert there.pool.stats().reserved == 4
    for part in (slice(0, 1), slice(1, 4)):
        ticket = here.peers.transfer(
            here.pool, there.peer, src[part], reservation.addrs[part], TransferMode.AGGREGATED
        )
        assert ticket.result(TIMEOUT_S).num_sent == len(src[part])
    assert reservation.commit(keys) == 4
    assert there.has(PROMPT) == 4
    with pytest.raises(BlockStateError):
        here.peers.transfer(here.pool, there.peer, src, reservation.addrs, TransferMode.AGGREGATED)
    here.pool.free_mem(src)


def test_transfer_with_insert_commits_an_earlier_reservation(ends: tuple[End, End]) -> None:
    here, there = ends
    src = write(here.pool, keys_of(PROMPT))
    reservation = here.peers.reserve(here.pool, there.peer, 4)
    ticket = here.peers.transfer_with_insert(
        here.pool, there.peer, keys_of(PROMPT), src, reservation.addrs, TransferMode.BY_LAYER
    )
    assert ticket.result(TIMEOUT_S).num_sent == 4
    assert there.has(PROMPT) == 4
    here.pool.free_mem(src)


def test_a_reservation_that_is_not_full_goes_on_until_it_is_cancelled(ends: tuple[End, End]) -> None:
    here, there = ends
    reservation = here.peers.reserve(here.pool, there.peer, 4)
    with pytest.raises(BlockStateError, match="0 blocks written"):
        reservation.commit()
    assert there.pool.stats().reserved == 4
    reservation.cancel()
    assert there.pool.stats().reserved == 0
    with pytest.raises(PeerDeclined, match="13 blocks wanted"):
        here.peers.reserve(here.pool, there.peer, 13)

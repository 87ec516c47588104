"""One endpoint of a process serves its handoff and its pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from mempool.harness import LAYOUT, keys_of, make_pool, store

from memserve.disagg.transfer_engine import TransferEngine
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient
from memserve.wire.messages import Refused
from memserve.wire.peer_messages import Declined, Hello, Locate

CONFIG = TransportConfig("tcp")
NUM_BYTES = 4096


class Process:
    """What a prefill or decode process has: an endpoint with a handoff engine and a pool."""

    def __init__(self) -> None:
        self.endpoint = TransferEndpoint(CONFIG)
        self.engine = TransferEngine(self.endpoint, CONFIG, timeout_s=5.0)
        self.memory = np.zeros(NUM_BYTES, np.uint8)
        self.engine.register(self.memory.ctypes.data, NUM_BYTES)
        self.pool: MemPool = make_pool(8)
        self.peers = Peers(self.endpoint, partial(open_transports, CONFIG, None), lambda _: self.pool)

    def hand_off(self, other: Process) -> int:
        return self.engine.transfer_sync(
            other.engine.get_session_id(), self.memory.ctypes.data, other.memory.ctypes.data, NUM_BYTES
        )

    def close(self) -> None:
        self.peers.close()
        self.engine.close()


@pytest.fixture
def pair() -> Iterator[tuple[Process, Process]]:
    here, there = Process(), Process()
    yield here, there
    here.close()
    there.close()


def test_endpoint_serves_handoff_and_pool_under_one_address_and_epoch(pair: tuple[Process, Process]) -> None:
    here, there = pair
    here.memory[:] = 7
    store(here.pool, [1, 2])
    assert here.hand_off(there) == 0
    assert here.peers.transfer_with_insert(there.peers.address, here.pool, keys_of([1, 2])).num_sent == 2
    assert there.memory.tobytes() == bytes([7]) * NUM_BYTES
    assert there.pool.num_cached(keys_of([1, 2])) == 2
    assert there.engine.get_session_id() == f"{there.endpoint.address.control}:{there.endpoint.epoch}"


def test_pool_that_fences_a_peer_does_not_stop_its_handoff(pair: tuple[Process, Process]) -> None:
    here, there = pair
    store(here.pool, [1, 2])
    assert here.hand_off(there) == 0
    there.peers.gone(here.endpoint.epoch)
    assert here.hand_off(there) == 0
    assert here.peers.transfer_with_insert(there.peers.address, here.pool, keys_of([1, 2])).num_sent == 2
    assert here.hand_off(there) == 0


def test_endpoint_without_users_declines_a_handshake_and_refuses_other_messages() -> None:
    endpoint = TransferEndpoint(CONFIG)
    with closing(endpoint), closing(ControlClient(endpoint.address.control)) as client:
        for layout in (None, LAYOUT):
            hello = Hello(endpoint.epoch, endpoint.epoch, endpoint.epoch, layout)
            assert isinstance(client.request(hello, timeout_s=5), Declined)
        assert isinstance(client.request(Locate(LAYOUT.digest, ()), timeout_s=5), Refused)

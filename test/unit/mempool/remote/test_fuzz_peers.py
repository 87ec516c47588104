"""Whatever peers say: an answer or a refusal, and in the end nothing of it is left."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router.message_strategies import CHAIN, messages

from memserve.core.errors import WireMismatch
from memserve.core.ids import Epoch
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.messages import Message, decode, encode
from memserve.wire.peer_messages import (
    AcquireLease,
    Cancel,
    Commit,
    Evacuate,
    Evacuated,
    EvacuationTarget,
    Fetch,
    Fetched,
    Hello,
    Locate,
    ReleaseLease,
    Reserve,
)

from ..harness import make_pool, write
from .harness import LEASE_S, RESERVATION_S, World

KINDS = (Reserve, Commit, Cancel, Locate, AcquireLease, ReleaseLease)
PEER = Epoch(1)


@settings(max_examples=300)
@given(st.lists(messages(*KINDS), max_size=14), st.data())
def test_a_pool_answers_or_refuses_any_messages_and_leaks_nothing(
    heard: list[Message], data: st.DataObject
) -> None:
    world = World()
    node = world.start("here", 4)
    node.pools.add(node.pool)
    layout = node.pool.layout
    node.answer(Hello(PEER, node.address.epoch, PEER, layout))
    for message in heard:
        known = hasattr(message, "layout") and data.draw(st.booleans())
        node.answer(msgspec.structs.replace(message, layout=layout.digest) if known else message)
        if data.draw(st.booleans()):
            world.clock.advance(data.draw(st.sampled_from([1.0, LEASE_S, RESERVATION_S])))
            node.sweep()
    for _ in range(3):
        world.clock.advance(RESERVATION_S + LEASE_S + 10.0)
        node.sweep()
    stats = node.pool.stats()
    assert stats.private == stats.reserved == stats.quarantined == stats.leases == 0


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    """Real ones: what a thread of theirs raises would end the process."""
    config = TransportConfig("tcp")
    peers = Peers(
        TransferEndpoint(config),
        partial(open_transports, config, None),
        lambda _: make_pool(4),
        PeersConfig(timeout_s=0.01),
    )
    yield peers
    peers.close()


@pytest.mark.parametrize("timeout_s", [0.01, 0.0, -1.0, float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "", "a", ":", "a:b", "127.0.0.1:99999999", "\x00:1", "a b:1", "[::1", "*:*"]
)
def test_fetches_and_evacuations_to_bad_addresses_are_answered(
    peers: Peers, address: str, timeout_s: float
) -> None:
    pool = make_pool(4)
    pool.insert(CHAIN[:2], write(pool, CHAIN[:2]))
    peers.add(pool)
    layout = pool.layout.digest
    fetch = Fetch(layout, CHAIN, None, address, Epoch(5), timeout_s)
    target = EvacuationTarget("other", address, Epoch(5))
    for message in (fetch, Evacuate(layout, (target,), timeout_s)):
        try:
            answer = peers._answer(decode(encode(message)))
        except WireMismatch:
            assert not 0 <= timeout_s <= 86400
            continue
        if isinstance(answer, Future):
            answer = answer.result(10)
        assert isinstance(answer, Fetched | Evacuated)

"""Any control message gets an answer or a refusal. Another outcome would end the process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.errors import MemServeError, WireMismatch
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.control import ControlHandler
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import (
    Heartbeat,
    Message,
    PoolEvents,
    PoolHeartbeat,
    Register,
    RegisterPool,
    SnapshotPart,
    decode,
    encode,
)

from .message_strategies import CHAIN, messages

TO_ROUTER = (Register, Heartbeat, RegisterPool, PoolHeartbeat, PoolEvents, SnapshotPart)


class Router:
    """What answers control messages, without a loop."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.cluster = InstanceRegistry(ClusterConfig(heartbeat_secs=2.0), self.clock)
        self.pools = Pools(ClusterConfig(heartbeat_secs=2.0), self.clock)
        self.feed = TreeSynchronizer(
            GlobalPromptTree(max_blocks=8, clock=self.clock), self.pools, audit_s=5.0, clock=self.clock
        )
        self._handler = ControlHandler(self.cluster, self.pools, self.feed, None)  # type: ignore[arg-type]

    def hear(self, message: Message) -> Message | None:
        """The answer that the control server would send; None for a refusal."""
        try:
            answer = self._handler.answer(decode(encode(message)))
        except MemServeError:
            return None
        assert repr(decode(encode(answer))) == repr(answer)
        return answer

    def look(self) -> None:
        """Run the upkeep and read the statistics."""
        self.clock.advance(3.0)
        self.cluster.check_heartbeats()
        self.pools.forget_silent()
        self.feed.synced_tree().tidy()
        self.feed.audit_results()
        stats = self.feed.synced_tree().stats()
        assert stats.blocks <= 8 + stats.expected
        self.feed.synced_tree().overlaps(CHAIN)
        self.feed.synced_tree().digest("a")


@settings(max_examples=300)
@given(st.lists(messages(), max_size=3) | st.lists(messages(*TO_ROUTER), max_size=14))
def test_router_answers_or_refuses_any_message(heard: list[Message]) -> None:
    router = Router()
    for message in heard:
        router.hear(message)
        router.look()


@given(messages(), st.data())
def test_message_round_trips_and_a_damaged_one_is_a_mismatch_or_another_message(
    message: Any, data: st.DataObject
) -> None:
    encoded = encode(message)
    assert repr(decode(encoded)) == repr(message)
    damaged = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        decode(bytes(damaged))
    except WireMismatch:
        return


@pytest.mark.parametrize("depth", [100, 10_000, 1_000_000])
def test_deeply_nested_message_is_a_mismatch(depth: int) -> None:
    with pytest.raises(WireMismatch):
        decode(b"\x92\x04" + b"\x91" * depth)

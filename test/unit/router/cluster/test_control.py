"""The control plane's handler: answers on the loop, without making the control thread wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.control import ControlHandler
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.wire.messages import Heartbeat, Message, PoolEvents, SnapshotPart, Unknown


class FailingReports:
    def events(self, message: PoolEvents) -> Message:
        raise RuntimeError("broken")

    def part(self, message: SnapshotPart) -> Message:
        raise RuntimeError("broken")


def handler() -> ControlHandler:
    config, loop = ClusterConfig(), asyncio.get_running_loop()
    cluster, pools = InstanceRegistry(config, time.monotonic), Pools(config, time.monotonic)
    return ControlHandler(cluster, pools, FailingReports(), loop)


async def test_control_handler_returns_before_the_loop_has_answered() -> None:
    answers = [handler()(Heartbeat(InstanceId("a"), Epoch(1), None)) for _ in range(3)]
    assert not any(answer.done() for answer in answers)
    assert [await asyncio.wrap_future(answer) for answer in answers] == [Unknown()] * 3


async def test_control_handler_passes_the_error_of_a_report_on() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wrap_future(handler()(PoolEvents(Epoch(1), ())))

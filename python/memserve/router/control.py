"""The router's end of the control plane: instances come, say that they live, and go."""

from __future__ import annotations

import asyncio

from memserve.core.errors import Retryable
from memserve.router.cluster import Cluster
from memserve.router.config import STATIC_EPOCH
from memserve.wire.messages import Accepted, Deregister, Heartbeat, Message, Refused, Register, Role, Unknown

LOOP_TIMEOUT_S = 5.0


class ControlHandler:
    """Answers control messages. Called on the control thread; acts on the loop's."""

    def __init__(self, cluster: Cluster, loop: asyncio.AbstractEventLoop) -> None:
        self._cluster = cluster
        self._loop = loop

    def __call__(self, message: Message) -> Message:
        """The answer to one message. Raises Retryable if the loop does not get to it in time."""
        asked = asyncio.run_coroutine_threadsafe(self._answer(message), self._loop)
        try:
            return asked.result(timeout=LOOP_TIMEOUT_S)
        except TimeoutError as error:
            asked.cancel()
            raise Retryable("the router is too busy to answer") from error

    async def _answer(self, message: Message) -> Message:
        return answer(self._cluster, message)


def answer(cluster: Cluster, message: Message) -> Message:
    """Apply `message` to `cluster`. Loop thread only."""
    match message:
        case Register(info):
            if info.epoch == STATIC_EPOCH:
                return Refused("an epoch is never 0")
            if info.role is Role.PREFILL and info.bootstrap_port is None:
                return Refused("a prefill instance has to say its bootstrap port")
            cluster.register(info)
            return Accepted(cluster.heartbeat_s)
        case Heartbeat(instance_id, epoch):
            return Accepted(cluster.heartbeat_s) if cluster.heartbeat(instance_id, epoch) else Unknown()
        case Deregister(instance_id, epoch):
            cluster.deregister(instance_id, epoch)
            return Accepted(cluster.heartbeat_s)
        case _:
            return Refused(f"a router does not answer {type(message).__name__}")

"""The router's end of the control plane: instances and pools come, say that they live, and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from memserve.core.errors import Retryable
from memserve.router.cluster.caching import rejection_reason
from memserve.router.cluster.discovery.static import STATIC_EPOCH
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.wire.messages import (
    Accepted,
    Deregister,
    DeregisterPool,
    Done,
    Heartbeat,
    InstanceInfo,
    Message,
    NamedPrompt,
    PoolEvents,
    PoolHeartbeat,
    PoolInfo,
    Refused,
    Register,
    RegisterPool,
    Role,
    SnapshotPart,
    Unknown,
)

LOOP_TIMEOUT_S = 5.0


class CacheReports(Protocol):
    """Takes what pools report of the blocks they hold. Loop thread only."""

    def events(self, message: PoolEvents) -> Message:
        """Apply a pool's changes; the answer may request a snapshot or an audit."""

    def part(self, message: SnapshotPart) -> Message:
        """Take one part of a snapshot or an audit."""


class ControlHandler:
    """Answers control messages. Called on the control thread; acts on the loop's."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        pools: Pools,
        feed: CacheReports,
        loop: asyncio.AbstractEventLoop,
        on_named: Callable[[NamedPrompt], None] = lambda _: None,
    ) -> None:
        """`on_named` is told of prompts' keys, on the loop."""
        self._cluster = cluster
        self._pools = pools
        self._feed = feed
        self._loop = loop
        self._on_named = on_named

    def __call__(self, message: Message) -> Message:
        """The answer to one message. Raises Retryable if the loop does not get to it in time."""
        asked = asyncio.run_coroutine_threadsafe(self._answer(message), self._loop)
        try:
            return asked.result(timeout=LOOP_TIMEOUT_S)
        except TimeoutError as error:
            asked.cancel()
            raise Retryable("the router is too busy to answer") from error

    async def _answer(self, message: Message) -> Message:
        if isinstance(message, PoolEvents):
            for prompt in message.named:
                self._on_named(prompt)
            return self._feed.events(message)
        if isinstance(message, SnapshotPart):
            return self._feed.part(message)
        return answer(self._cluster, self._pools, message)


def answer(cluster: InstanceRegistry, pools: Pools, message: Message) -> Message:
    """Apply `message` to `cluster` or `pools`. Loop thread only."""
    match message:
        case Register(info, is_draining):
            reason = _why_not(info) or rejection_reason(cluster, pools, info.instance_id, info.caching)
            if reason is not None:
                return Refused(reason)
            member = cluster.register(info, is_draining=is_draining)
            return Accepted(cluster.heartbeat_s, member.is_draining, member.new_role)
        case Heartbeat(instance_id, epoch, load):
            known = cluster.heartbeat(instance_id, epoch, load)
            if known is None:
                return Unknown()
            return Accepted(cluster.heartbeat_s, known.is_draining, known.new_role)
        case Deregister(instance_id, epoch):
            cluster.deregister(instance_id, epoch)
            return Accepted(cluster.heartbeat_s)
        case RegisterPool(pool):
            reason = _why_no_pool(pool) or pools.rejection_reason(pool)
            reason = reason or rejection_reason(cluster, pools, pool.instance_id, pool.caching)
            return pools.register(pool) if reason is None else Refused(reason)
        case PoolHeartbeat(epoch, version, tiers):
            return pools.heartbeat(epoch, version, tiers) or Unknown()
        case DeregisterPool(epoch):
            pools.deregister(epoch)
            return Done()
        case _:
            return Refused(f"a router does not answer {type(message).__name__}")


def _why_not(info: InstanceInfo) -> str | None:
    if info.epoch == STATIC_EPOCH:
        return "an epoch is never 0"
    if info.role is Role.MEMORY:
        return "a memory instance takes no requests: it registers its pool only"
    if info.role is Role.PREFILL and info.bootstrap_port is None:
        return "a prefill instance has to say its bootstrap port"
    return None


def _why_no_pool(info: PoolInfo) -> str | None:
    if info.epoch == STATIC_EPOCH:
        return "an epoch is never 0"
    if info.role is Role.PREFILL and not info.bootstrap:
        return "the pool of a prefill instance has to say its bootstrap address"
    return None

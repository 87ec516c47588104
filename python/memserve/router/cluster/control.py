"""The router's end of the control plane: instances and pools register, send heartbeats, and leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from memserve.core.caching import CachingMode
from memserve.core.ids import InstanceId
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
    PoolEvents,
    PoolHeartbeat,
    PoolInfo,
    PromptKeys,
    Refused,
    Register,
    RegisterPool,
    Role,
    SnapshotPart,
    Unknown,
)


class CacheReports(Protocol):
    """Takes what pools report of the blocks they hold. Loop thread only."""

    def events(self, message: PoolEvents) -> Message:
        """Apply a pool's changes; the answer may request a snapshot or an audit."""

    def part(self, message: SnapshotPart) -> Message:
        """Take one part of a snapshot or an audit."""


class ControlHandler:
    """Answers control messages, in the order in which they come. Called on the control thread; acts on the
    loop's."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        pools: Pools,
        reports: CacheReports,
        loop: asyncio.AbstractEventLoop,
        on_prompt_keys: Callable[[PromptKeys], None] = lambda _: None,
    ) -> None:
        """`on_prompt_keys` gets each reported pair of a request and its prompt's keys, on the loop."""
        self._cluster = cluster
        self._pools = pools
        self._reports = reports
        self._loop = loop
        self._on_prompt_keys = on_prompt_keys

    def __call__(self, message: Message) -> Future[Message]:
        """The answer to one message, once the loop has handled it."""
        answered: Future[Message] = Future()
        self._loop.call_soon_threadsafe(self._resolve, answered, message)
        return answered

    def answer(self, message: Message) -> Message:
        """Apply one message. Loop thread only."""
        if isinstance(message, PoolEvents):
            for prompt in message.prompts:
                self._on_prompt_keys(prompt)
            return self._reports.events(message)
        if isinstance(message, SnapshotPart):
            return self._reports.part(message)
        return answer(self._cluster, self._pools, message)

    def _resolve(self, answered: Future[Message], message: Message) -> None:
        try:
            answered.set_result(self.answer(message))
        except Exception as error:  # the control thread raises it again
            answered.set_exception(error)


def answer(cluster: InstanceRegistry, pools: Pools, message: Message) -> Message:
    """Apply `message` to `cluster` or `pools`. Loop thread only."""
    match message:
        case Register(info, is_draining):
            reason = _instance_error(info) or caching_conflict(cluster, pools, info.instance_id, info.caching)
            if reason is not None:
                return Refused(reason)
            member = cluster.register(info, is_draining=is_draining)
            return Accepted(cluster.heartbeat_s, member.is_draining, member.new_role)
        case Heartbeat(instance_id, epoch, load):
            known = cluster.heartbeat(instance_id, epoch, load)
            if known is None:
                return Unknown()
            return Accepted(cluster.heartbeat_s, known.is_draining, known.new_role)
        case Deregister(instance_id, epoch, has_crashed):
            cluster.deregister(instance_id, epoch, has_crashed=has_crashed)
            return Accepted(cluster.heartbeat_s)
        case RegisterPool(pool):
            reason = _pool_error(pool) or pools.rejection_reason(pool)
            reason = reason or caching_conflict(cluster, pools, pool.instance_id, pool.caching)
            return pools.register(pool) if reason is None else Refused(reason)
        case PoolHeartbeat(epoch, version, tiers):
            return pools.heartbeat(epoch, version, tiers) or Unknown()
        case DeregisterPool(epoch):
            pools.deregister(epoch)
            return Done()
        case _:
            return Refused(f"a router does not answer {type(message).__name__}")


def _instance_error(info: InstanceInfo) -> str | None:
    if info.epoch == STATIC_EPOCH:
        return "an epoch is never 0"
    if info.role is Role.MEMORY:
        return "a memory instance serves no requests: it registers its pool only"
    if info.role is Role.PREFILL and info.bootstrap_port is None:
        return "a prefill instance has to give its bootstrap port"
    return None


def _pool_error(info: PoolInfo) -> str | None:
    if info.epoch == STATIC_EPOCH:
        return "an epoch is never 0"
    if info.role is Role.PREFILL and not info.bootstrap:
        return "the pool of a prefill instance has to give its bootstrap address"
    return None


def agreed_caching(
    cluster: InstanceRegistry, pools: Pools, *, besides: InstanceId | None = None
) -> CachingMode | None:
    """The caching mode of the registered instances, `besides` one of them; None if there is none.

    Servers named by URL have no mode.
    """
    modes = [(info.instance_id, info.caching) for info in pools.infos()]
    modes += [(it.info.instance_id, it.info.caching) for it in cluster.members() if not it.is_static]
    return next((mode for instance_id, mode in modes if instance_id != besides), None)


def caching_conflict(
    cluster: InstanceRegistry, pools: Pools, instance_id: InstanceId, caching: CachingMode
) -> str | None:
    """Why an instance with this caching mode cannot join; None if it can.

    The first registered instance decides. An instance that comes back may change its mode if it is alone.
    """
    agreed = agreed_caching(cluster, pools, besides=instance_id)
    if agreed is None or agreed is caching:
        return None
    return (
        f"{instance_id} has --caching {caching}, but this cluster runs with --caching {agreed}: "
        f"restart it with --caching {agreed}, or stop all the others first"
    )

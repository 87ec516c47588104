"""Chooses, for each ready instance, how the global prompt tree learns the instance's cache.

    it has a memory pool          ──> pool      the pool reports its blocks itself, exactly
    it publishes SGLang's events  ──> events    one `KvEventSubscriber` per cache
    it has a cache                ──> mirror    answered prompts are assumed to stay cached for a while
    it has no cache               ──> none

In the tree an instance with one cache, or with an approximate one, has its own name; several caches that
publish events are NAME/dpN, like the pools of data-parallel ranks. Knows no requests and no policy. Event
loop thread only. Source: MemServe (global prompt trees).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import zmq.asyncio

from memserve.core.block_keys import BlockKey
from memserve.core.ids import Epoch, InstanceId, server_of
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.subscriber import KvEventSubscriber, SourceStats, SubscriberTimeouts
from memserve.router.server_info import EventSourceInfo
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

logger = logging.getLogger(__name__)


class Mode(StrEnum):
    """How the tree learns the cache of an instance."""

    POOL = "pool"
    EVENTS = "events"
    MIRROR = "mirror"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """How the tree learns the cache of one instance."""

    mode: Mode
    answered_blocks: int = 0
    """Blocks of answered prompts, in mode MIRROR."""
    sources: Mapping[InstanceId, SourceStats] = field(default_factory=dict)
    """By name in the tree, in mode EVENTS."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to learn one instance's cache. It differs when the process or its settings differ."""

    epoch: Epoch
    url: str
    mode: Mode
    source_info: EventSourceInfo


@dataclass(slots=True)
class _Subscription:
    plan: _Plan
    subscribers: list[KvEventSubscriber]
    answered_blocks: int = 0

    @property
    def is_displaced(self) -> bool:
        return any(each.is_displaced for each in self.subscribers)


class StockSubscriptions:
    """The subscriptions to all ready instances. Close it."""

    def __init__(
        self,
        tree: Callable[[], GlobalPromptTree],
        *,
        max_event_keys: int = 1 << 20,
        approximate_ttl_s: float = 600.0,
        timeouts: SubscriberTimeouts | None = None,
    ) -> None:
        """`tree`: returns the tree with exactly the registered pools in it.

        `max_event_keys`: keys remembered by event hash, at 250 bytes each; it should exceed the blocks of
        all caches that publish events. `approximate_ttl_s`: how long an answered prompt is assumed to be
        cached by an instance that reports nothing.
        """
        self._tree = tree
        self._approximate_ttl_s = approximate_ttl_s
        self._timeouts = timeouts or SubscriberTimeouts()
        self._event_keys = EventHashKeys(max_event_keys)
        self._context = zmq.asyncio.Context()
        self._subscriptions: dict[InstanceId, _Subscription] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._seen: tuple[ClusterSnapshot, int] | None = None

    def update(self, snapshot: ClusterSnapshot, pools: Pools) -> None:
        """Subscribe to the ready instances and unsubscribe from all others. Cheap without a change."""
        displaced = any(each.is_displaced for each in self._subscriptions.values())
        if self._seen == (snapshot, pools.version) and not displaced:
            return
        self._seen = snapshot, pools.version
        pool_names = {info.instance_id for info in pools.infos()}
        self._tree()
        with_pools = pool_names | {server_of(name) for name in pool_names}
        plans = {one.instance_id: _plan(one, with_pools) for one in snapshot.all()}
        for instance_id, subscription in list(self._subscriptions.items()):
            if plans.get(instance_id) != subscription.plan or subscription.is_displaced:
                del self._subscriptions[instance_id]
                self._stop(instance_id, subscription, pool_names)
        for instance_id, plan in plans.items():
            if instance_id not in self._subscriptions:
                self._subscriptions[instance_id] = _Subscription(plan, self._start(instance_id, plan))

    def record_prompt(self, keys: Iterable[BlockKey]) -> None:
        """Remember the keys of a placed prompt: events may name its blocks by their hashes."""
        if any(each.subscribers for each in self._subscriptions.values()):
            self._event_keys.add(keys)

    def record_answer(self, instance_id: InstanceId, keys: Sequence[BlockKey]) -> None:
        """The instance has answered a prompt of these blocks. Ignored unless its cache is approximate."""
        subscription = self._subscriptions.get(instance_id)
        if subscription is not None and subscription.plan.mode is Mode.MIRROR:
            subscription.answered_blocks += len(keys)
            self._tree().learn(instance_id, keys)

    def record_flush(self, instance_id: InstanceId) -> None:
        """The instance has emptied its cache. Ignored unless its cache is approximate."""
        subscription = self._subscriptions.get(instance_id)
        if subscription is not None and subscription.plan.mode is Mode.MIRROR:
            self._join_approximate(instance_id, subscription.plan)

    def is_approximate(self, instance_id: InstanceId) -> bool:
        """Whether the tree knows the instance's cache by its answers alone."""
        subscription = self._subscriptions.get(instance_id)
        return subscription is not None and subscription.plan.mode is Mode.MIRROR

    def stats(self) -> dict[InstanceId, SubscriptionStats]:
        """A copy, by ready instance."""
        return {
            instance_id: SubscriptionStats(
                subscription.plan.mode,
                subscription.answered_blocks,
                {each.instance: each.stats for each in subscription.subscribers},
            )
            for instance_id, subscription in self._subscriptions.items()
        }

    @property
    def num_ambiguous(self) -> int:
        """The number of event hashes that several keys share; they are ignored."""
        return self._event_keys.num_ambiguous

    async def close(self) -> None:
        """End all subscriptions; the tree stays as it is. Idempotent."""
        for subscription in self._subscriptions.values():
            self._stopping |= {each.stop() for each in subscription.subscribers}
        self._subscriptions.clear()
        if self._stopping:
            await asyncio.wait(self._stopping)
        self._context.destroy(linger=0)

    def _start(self, instance_id: InstanceId, plan: _Plan) -> list[KvEventSubscriber]:
        logger.info("instance followed instance=%s by=%s", instance_id, plan.mode)
        if plan.mode is Mode.MIRROR:
            self._join_approximate(instance_id, plan)
        if plan.mode is not Mode.EVENTS or plan.source_info.events is None:
            return []
        sources = plan.source_info.events.sources(plan.url)
        return [
            KvEventSubscriber(
                InstanceId(f"{instance_id}/dp{rank}") if len(sources) > 1 else instance_id,
                source,
                self._tree,
                self._event_keys,
                self._context,
                self._timeouts,
            )
            for rank, source in enumerate(sources)
        ]

    def _join_approximate(self, instance_id: InstanceId, plan: _Plan) -> None:
        """Put an empty approximate cache into the tree."""
        capacity_blocks = plan.source_info.capacity_blocks
        self._tree().join_approximate(
            instance_id, capacity_blocks=capacity_blocks, ttl_s=self._approximate_ttl_s
        )

    def _stop(
        self, instance_id: InstanceId, subscription: _Subscription, pool_names: set[InstanceId]
    ) -> None:
        """Remove the caches from the tree, except a pool that has registered under the same name."""
        names = {each.instance for each in subscription.subscribers}
        if subscription.plan.mode is Mode.MIRROR:
            names.add(instance_id)
        for each in subscription.subscribers:
            task = each.stop()
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        for name in names - pool_names:
            self._tree().leave(name)


def _plan(instance: Instance, with_pools: set[InstanceId]) -> _Plan:
    source_info = instance.server_info.event_source_info
    if instance.instance_id in with_pools:
        mode = Mode.POOL
    elif not source_info.keeps:
        mode = Mode.NONE
    elif source_info.events is not None and source_info.events.sources(instance.url):
        mode = Mode.EVENTS
    else:
        mode = Mode.MIRROR
    return _Plan(instance.epoch, instance.url, mode, source_info)

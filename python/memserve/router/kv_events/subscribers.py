"""Decides how the cluster's tree learns what each ready instance holds, and sees to it that it does.

    it has a pool of its own      ──> pool      it reports by itself, exactly
    it publishes SGLang's events  ──> events    `KvEventSubscriber`: one for each of its caches
    it keeps what it has computed ──> mirror    what it answered is believed to be there, for a while
    it keeps nothing              ──> none

An instance with one cache, or with a mirror, is in the tree under its own name; caches that publish for
themselves are there as NAME/dpN, as their pools would be. Knows no requests and no policy. Event loop
thread only.
Source: MemServe (global prompt trees); D10 of the design.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import zmq

from memserve.core.block_keys import BlockKey
from memserve.core.ids import Epoch, InstanceId, server_of
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.subscriber import KvEventSubscriber, SourceStats, SubscriberTimeouts
from memserve.router.server_info import EventSourceInfo
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

logger = logging.getLogger(__name__)

MIRROR_TTL_S = 600.0
"""For how long an answered prompt is believed to be cached where nothing is reported."""
MAX_NAMED_KEYS = 1 << 20
"""At 250 bytes each, and only if they come."""


class Mode(StrEnum):
    """How the tree learns of an instance."""

    POOL = "pool"
    EVENTS = "events"
    MIRROR = "mirror"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """How an instance is followed."""

    mode: Mode
    answered_blocks: int = 0
    """That a mirror was told of."""
    sources: Mapping[InstanceId, SourceStats] = field(default_factory=dict)
    """By name in the tree, where there are events."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to do about an instance: another, when its process is another or says other things of itself."""

    epoch: Epoch
    url: str
    mode: Mode
    following: EventSourceInfo


@dataclass(slots=True)
class _Subscription:
    plan: _Plan
    followers: list[KvEventSubscriber]
    answered_blocks: int = 0

    @property
    def is_displaced(self) -> bool:
        return any(follower.is_displaced for follower in self.followers)


class StockSubscriptions:
    """Every ready instance, and how it is followed. To be closed."""

    def __init__(
        self,
        tree: Callable[[], GlobalPromptTree],
        following: Callable[[Instance], EventSourceInfo],
        *,
        max_named_keys: int = MAX_NAMED_KEYS,
        mirror_ttl_s: float = MIRROR_TTL_S,
        patience: SubscriberTimeouts | None = None,
    ) -> None:
        """`tree`: with the pools that are registered now in it, those that are not any more out of it.
        `following`: what an instance says of itself.

        `max_named_keys` should be more than the blocks of all caches that publish events.
        """
        self._tree = tree
        self._following = following
        self._mirror_ttl_s = mirror_ttl_s
        self._patience = patience or SubscriberTimeouts()
        self._short = EventHashKeys(max_named_keys)
        self._context = zmq.Context()
        self._followed: dict[InstanceId, _Subscription] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._seen: tuple[ClusterSnapshot, int] | None = None

    def follow(self, snapshot: ClusterSnapshot, pools: Pools) -> None:
        """Bring what is followed in line with who is ready, and who has a pool. For each change of
        either; cheap if there was none."""
        displaced = any(followed.is_displaced for followed in self._followed.values())
        if self._seen == (snapshot, pools.version) and not displaced:
            return
        self._seen = snapshot, pools.version
        pool_names = {info.instance_id for info in pools.infos()}
        self._tree()
        with_pools = pool_names | {server_of(name) for name in pool_names}
        plans = {one.instance_id: self._plan(one, with_pools) for one in snapshot.all()}
        for instance_id, followed in list(self._followed.items()):
            if plans.get(instance_id) != followed.plan or followed.is_displaced:
                del self._followed[instance_id]
                self._stop(instance_id, followed, pool_names)
        for instance_id, plan in plans.items():
            if instance_id not in self._followed:
                self._followed[instance_id] = _Subscription(plan, self._start(instance_id, plan))

    def know(self, keys: Iterable[BlockKey]) -> None:
        """A prompt of these came by: workers may tell of its blocks by their short names."""
        if any(followed.followers for followed in self._followed.values()):
            self._short.add(keys)

    def answered(self, instance_id: InstanceId, keys: Sequence[BlockKey]) -> None:
        """The instance has answered a prompt of these; of use where that is all that is known of it."""
        followed = self._followed.get(instance_id)
        if followed is not None and followed.plan.mode is Mode.MIRROR:
            followed.answered_blocks += len(keys)
            self._tree().learn(instance_id, keys)

    def flushed(self, instance_id: InstanceId) -> None:
        """The instance has emptied its cache; whoever reports says so itself."""
        followed = self._followed.get(instance_id)
        if followed is not None and followed.plan.mode is Mode.MIRROR:
            self._mirror(instance_id, followed.plan)

    def believes(self, instance_id: InstanceId) -> bool:
        """Whether what it answered is all that is known of its cache."""
        followed = self._followed.get(instance_id)
        return followed is not None and followed.plan.mode is Mode.MIRROR

    def stats(self) -> dict[InstanceId, SubscriptionStats]:
        """A copy, by instance; an instance that is not ready is not in it."""
        return {
            instance_id: SubscriptionStats(
                followed.plan.mode,
                followed.answered_blocks,
                {follower.instance: follower.stats for follower in followed.followers},
            )
            for instance_id, followed in self._followed.items()
        }

    @property
    def num_ambiguous(self) -> int:
        """Short names that are not believed, as two blocks have them."""
        return self._short.num_ambiguous

    async def close(self) -> None:
        """Follow nobody; the tree stays as it is. Idempotent."""
        for followed in self._followed.values():
            self._stopping |= {follower.stop() for follower in followed.followers}
        self._followed.clear()
        if self._stopping:
            await asyncio.wait(self._stopping)
        self._context.destroy(linger=0)

    def _plan(self, instance: Instance, with_pools: set[InstanceId]) -> _Plan:
        following = self._following(instance)
        if instance.instance_id in with_pools:
            mode = Mode.POOL
        elif not following.keeps:
            mode = Mode.NONE
        elif following.events is not None and following.events.sources(instance.url):
            mode = Mode.EVENTS
        else:
            mode = Mode.MIRROR
        return _Plan(instance.epoch, instance.url, mode, following)

    def _start(self, instance_id: InstanceId, plan: _Plan) -> list[KvEventSubscriber]:
        logger.info("instance followed instance=%s by=%s", instance_id, plan.mode)
        if plan.mode is Mode.MIRROR:
            self._mirror(instance_id, plan)
        if plan.mode is not Mode.EVENTS or plan.following.events is None:
            return []
        sources = plan.following.events.sources(plan.url)
        return [
            KvEventSubscriber(
                InstanceId(f"{instance_id}/dp{rank}") if len(sources) > 1 else instance_id,
                source,
                self._tree,
                self._short,
                self._context,
                self._patience,
            )
            for rank, source in enumerate(sources)
        ]

    def _mirror(self, instance_id: InstanceId, plan: _Plan) -> None:
        """A mirror with nothing in it."""
        capacity_blocks = plan.following.capacity_blocks
        self._tree().mirror(instance_id, capacity_blocks=capacity_blocks, ttl_s=self._mirror_ttl_s)

    def _stop(self, instance_id: InstanceId, followed: _Subscription, pool_names: set[InstanceId]) -> None:
        """Forget what was learnt, but not what a pool reports that has taken the place."""
        names = {follower.instance for follower in followed.followers}
        if followed.plan.mode is Mode.MIRROR:
            names.add(instance_id)
        for follower in followed.followers:
            task = follower.stop()
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        for name in names - pool_names:
            self._tree().leave(name)

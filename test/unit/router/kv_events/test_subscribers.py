"""StockSubscriptions: the mode of each instance, and the removal of instances that have left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import zmq

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.subscriber import SubscriberTimeouts
from memserve.router.kv_events.subscribers import Mode, StockSubscriptions, SubscriptionStats
from memserve.router.server_info import EventPublisher, EventSourceInfo, ServerInfo
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree, Overlap
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import PoolInfo, Role

from .stock_publisher import FakePublisher, stored, until

TOKENS = list(range(12))
KEYS = page_keys(TOKENS, 2)
STORED = stored(KEYS, TOKENS)
KEEPS = EventSourceInfo(keeps=True, page_tokens=2, capacity_tokens=8)


ANN, BOB, POOL_EPOCH = InstanceId("ann"), InstanceId("bob"), Epoch(99)
SOON = SubscriberTimeouts(replay_s=0.2, retry_s=0.0)


def publishing(*publishers: FakePublisher) -> EventSourceInfo:
    port = int(publishers[0].source.endpoint.rpartition(":")[2])
    return replace(KEEPS, events=EventPublisher(None, port, None, "kv", len(publishers)))


async def adjacent_publishers() -> tuple[FakePublisher, FakePublisher]:
    """Two publishers of one server, on adjacent ports."""
    while True:
        first = FakePublisher()
        try:
            return first, FakePublisher(port=int(first.source.endpoint.rpartition(":")[2]) + 1)
        except zmq.ZMQError:  # another process uses that port
            await first.close()


def instance(name: InstanceId, source_info: EventSourceInfo, epoch: int = 1) -> Instance:
    facts = ServerInfo("m", "/m", event_source_info=source_info)
    return Instance(name, Epoch(epoch), Role.COLOCATED, "http://127.0.0.1:1", None, facts)


@dataclass
class Setup:
    """StockSubscriptions with their tree and the pools."""

    subscriptions: StockSubscriptions
    tree: GlobalPromptTree
    pools: Pools
    clock: FakeClock

    def update(self, *instances: Instance) -> None:
        self.subscriptions.update(ClusterSnapshot.of(instances), self.pools)

    def register_pool(self, name: str) -> None:
        """Register a pool that reports one block, as the synchronizer would."""
        layout = "l"
        self.pools.register(
            PoolInfo(InstanceId(name), POOL_EPOCH, Role.COLOCATED, CachingMode.FULL, "h:1", layout)
        )
        self.tree.join(InstanceId(name), POOL_EPOCH)
        self.tree.apply(InstanceId(name), POOL_EPOCH, [Stored(1, Tier.HBM, None, tuple(KEYS[:1]))])

    def depths(self) -> dict[InstanceId, int]:
        return {name: depth.cached for name, depth in self.tree.overlaps(KEYS).items()}

    def modes(self) -> dict[InstanceId, Mode]:
        return {name: stats.mode for name, stats in self.subscriptions.stats().items()}


@asynccontextmanager
async def set_up(*publishers: FakePublisher) -> AsyncIterator[Setup]:
    clock = FakeClock()
    tree, pools = GlobalPromptTree(clock=clock), Pools(ClusterConfig(heartbeat_secs=1.0), clock)
    subscriptions = StockSubscriptions(lambda: tree, timeouts=SOON)
    try:
        yield Setup(subscriptions, tree, pools, clock)
    finally:
        await subscriptions.close()
        for publisher in publishers:
            await publisher.close()


async def test_each_instance_gets_the_most_exact_mode_it_offers() -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        it.register_pool("pooled/dp1")
        offers = {
            "pooled": publishing(publisher),
            "publishes": publishing(publisher),
            "keeps": KEEPS,
            "forgets": replace(publishing(publisher), keeps=False),
            "silent": EventSourceInfo(),
        }
        it.update(*(instance(InstanceId(name), offer) for name, offer in offers.items()))
        assert list(it.modes().values()) == [Mode.POOL, Mode.EVENTS, Mode.MIRROR, Mode.NONE, Mode.NONE]
        assert set(it.tree.stats().instances) == {"pooled/dp1", "publishes", "keeps"}
        await publisher.subscribed()
        await publisher.publish(STORED)
        await until(lambda: it.depths().get(InstanceId("publishes")) == 6)
        sources = it.subscriptions.stats()[InstanceId("publishes")].sources
        assert sources[InstanceId("publishes")].stored == 6


async def test_answered_prompts_of_an_approximate_cache_count_within_capacity_and_ttl() -> None:
    async with set_up() as it:
        it.update(instance(ANN, KEEPS), instance(BOB, EventSourceInfo()))
        it.subscriptions.record_answer(ANN, KEYS)
        it.subscriptions.record_answer(BOB, KEYS)
        it.subscriptions.record_answer(InstanceId("nobody"), KEYS)
        assert it.depths() == {ANN: 4}, "the capacity is 4 blocks"
        assert it.subscriptions.stats() == {
            ANN: SubscriptionStats(Mode.MIRROR, 6),
            BOB: SubscriptionStats(Mode.NONE),
        }
        it.clock.advance(601)
        assert it.depths() == {}


async def test_flush_empties_an_approximate_cache() -> None:
    async with set_up() as it:
        it.update(instance(ANN, KEEPS), instance(BOB, KEEPS))
        for name in (ANN, BOB):
            it.subscriptions.record_answer(name, KEYS)
        it.subscriptions.record_flush(ANN)
        it.subscriptions.record_flush(InstanceId("nobody"))
        assert it.depths() == {BOB: 4}
        it.subscriptions.record_answer(ANN, KEYS)
        assert it.depths() == {ANN: 4, BOB: 4}


async def test_instance_that_is_not_ready_leaves_the_tree() -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        ann, bob = instance(ANN, publishing(publisher)), instance(BOB, KEEPS)
        it.update(ann, bob)
        await publisher.subscribed()
        await publisher.publish(STORED)
        await until(lambda: it.depths().get(ANN) == 6)
        it.subscriptions.record_answer(BOB, KEYS)
        it.update(bob)
        assert it.depths() == {BOB: 4}
        it.update()
        assert (it.depths(), it.modes(), it.tree.stats().instances) == ({}, {}, {})


async def test_new_process_starts_a_new_subscription_and_the_same_process_keeps_it() -> None:
    async with set_up() as it:
        it.update(instance(ANN, KEEPS))
        it.subscriptions.record_answer(ANN, KEYS)
        it.update(instance(ANN, KEEPS), instance(BOB, KEEPS))
        assert it.depths() == {ANN: 4}
        it.update(instance(ANN, KEEPS, epoch=2), instance(BOB, KEEPS))
        assert it.depths() == {}
        it.subscriptions.record_answer(ANN, KEYS)
        it.update(instance(ANN, replace(KEEPS, capacity_tokens=6), epoch=2))
        assert it.depths() == {}
        it.subscriptions.record_answer(ANN, KEYS)
        it.update(instance(ANN, replace(KEEPS, capacity_tokens=6, start_s=1.5), epoch=2))
        assert it.depths() == {}, "the server has restarted and was never unready"


@pytest.mark.parametrize("pool", ["ann", "ann/dp0", "ann/dp12"])
async def test_registered_pool_replaces_the_event_subscription(pool: str) -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        ann = instance(ANN, publishing(publisher))
        it.update(ann)
        await publisher.subscribed()
        await publisher.publish(STORED)
        await until(lambda: it.depths() == {ANN: 6})
        it.register_pool(pool)
        it.update(ann)
        assert (it.modes(), it.depths()) == ({ANN: Mode.POOL}, {pool: 1})
        it.pools.deregister(POOL_EPOCH)
        it.tree.leave(InstanceId(pool))
        it.update(ann)
        await publisher.subscribed()
        await publisher.publish(STORED)
        await until(lambda: it.depths() == {ANN: 6})


@pytest.mark.parametrize("pool", ["annabel", "ann/dp", "ann/dpx", "bann/dp0"])
async def test_pool_with_another_name_replaces_no_subscription(pool: str) -> None:
    async with set_up() as it:
        it.register_pool(pool)
        it.update(instance(ANN, KEEPS))
        assert it.modes() == {ANN: Mode.MIRROR}


async def test_displaced_subscription_returns_when_its_name_is_free() -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        ann = instance(ANN, publishing(publisher))
        it.update(ann)
        await publisher.subscribed()
        it.tree.leave(ANN)
        await publisher.publish(STORED)
        await until(lambda: it.subscriptions.stats()[ANN].sources[ANN].displaced)
        it.update(ann)
        await publisher.subscribed()
        await publisher.publish(STORED)
        await until(lambda: it.depths() == {ANN: 6})


async def test_each_cache_of_an_instance_has_its_own_name_in_the_tree() -> None:
    first, second = await adjacent_publishers()
    async with set_up(first, second) as it:
        it.update(instance(ANN, publishing(first, second)))
        await first.subscribed()
        await second.subscribed()
        await first.publish(STORED)
        await second.publish(stored(KEYS[:2], TOKENS[:4]))
        await until(lambda: it.depths() == {"ann/dp0": 6, "ann/dp1": 2})
        it.update()
        assert it.tree.stats().instances == {}


async def test_recorded_prompts_give_the_keys_of_events_without_tokens() -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        it.subscriptions.record_prompt(KEYS)
        it.update(instance(ANN, publishing(publisher)))
        await publisher.subscribed()
        await publisher.publish(stored(KEYS))
        await until(lambda: it.subscriptions.stats()[ANN].sources[ANN].unverified == 6)
        it.subscriptions.record_prompt(KEYS)
        await publisher.publish(stored(KEYS))
        await until(lambda: it.tree.overlaps(KEYS) == {ANN: Overlap((6, 6), 0)})
        it.subscriptions.record_prompt([BlockKey(KEYS[0][:8] + bytes(24))])
        assert it.subscriptions.num_ambiguous == 1


async def test_close_ends_all_subscriptions() -> None:
    publisher = FakePublisher()
    async with set_up(publisher) as it:
        it.update(instance(ANN, publishing(publisher)))
        await publisher.subscribed()
        num_tasks = len(asyncio.all_tasks())
        await it.subscriptions.close()
        assert len(asyncio.all_tasks()) == num_tasks - 1
        assert it.modes() == {}

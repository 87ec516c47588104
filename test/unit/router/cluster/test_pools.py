"""The registered memory pools, their members' messages, and the one caching mode of a cluster."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.control import agreed_caching, answer
from memserve.router.cluster.discovery.static import STATIC_EPOCH
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.testing.fake_clock import FakeClock
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.link import ControlClient
from memserve.wire.messages import (
    Accepted,
    Deregister,
    DeregisterPool,
    Done,
    InstanceInfo,
    Members,
    Message,
    PoolHeartbeat,
    PoolInfo,
    Refused,
    Register,
    RegisterPool,
    Role,
    TierBlocks,
    Unknown,
)

from ..harness import Stage, info_of, staged

FULL, BOTH = CachingMode.FULL, CachingMode.BOTH

DEFAULTS = ClusterConfig()


def pool(
    name: str = "p",
    epoch: int = 1,
    *,
    role: Role = Role.DECODE,
    caching: CachingMode = FULL,
    address: str | None = None,
    layout: str = "aa",
    bootstrap: str = "",
) -> PoolInfo:
    where = address or f"127.0.0.1:{1000 + epoch}"
    return PoolInfo(InstanceId(name), Epoch(epoch), role, caching, where, layout, bootstrap)


def decode(name: str, caching: CachingMode, epoch: int = 1) -> InstanceInfo:
    return InstanceInfo(
        InstanceId(name), Epoch(epoch), Role.DECODE, f"http://{name}:1", None, caching=caching
    )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pools(clock: FakeClock) -> Pools:
    return Pools(ClusterConfig(heartbeat_secs=1.0), clock)


@pytest.fixture
def cluster(clock: FakeClock) -> InstanceRegistry:
    return InstanceRegistry(ClusterConfig(heartbeat_secs=1.0), clock)


def epochs(pools: Pools) -> list[int]:
    return [info.epoch for info in pools.infos()]


def test_pools_register_returns_all_members(pools: Pools) -> None:
    pools.register(pool("a", 1))
    members = pools.register(pool("b", 2))
    assert members.heartbeat_s == 1.0
    assert members.pools == (pool("a", 1), pool("b", 2))


def test_pools_heartbeat_returns_members_only_after_a_change(pools: Pools) -> None:
    before = pools.register(pool("a", 1))
    assert pools.heartbeat(Epoch(1), before.version) == Members(1.0, before.version, None)
    pools.register(pool("b", 2))
    after = pools.heartbeat(Epoch(1), before.version)
    assert after is not None
    assert after.pools == (pool("a", 1), pool("b", 2))
    assert after.version > before.version
    pools.deregister(Epoch(2))
    last = pools.heartbeat(Epoch(1), after.version)
    assert last is not None
    assert last.pools == (pool("a", 1),)
    assert last.version > after.version


def test_pools_memories_leave_out_silent_instances(pools: Pools, clock: FakeClock) -> None:
    pools.register(pool("m", 1, role=Role.MEMORY, layout=""))
    pools.register(pool("n", 2, role=Role.MEMORY, layout=""))
    assert pools.memories() == ("m", "n")
    clock.advance(DEFAULTS.suspect_heartbeats + 0.1)
    pools.heartbeat(Epoch(2), 0)
    pools.forget_silent()
    assert (pools.memories(), epochs(pools)) == (("n",), [1, 2])
    pools.heartbeat(Epoch(1), 0)
    pools.forget_silent()
    assert pools.memories() == ("m", "n")


def test_pools_register_is_idempotent(pools: Pools, clock: FakeClock) -> None:
    before = pools.register(pool())
    clock.advance(DEFAULTS.forget_heartbeats)
    assert pools.register(pool()) == before
    clock.advance(DEFAULTS.forget_heartbeats)
    pools.forget_silent()
    assert epochs(pools) == [1]


@pytest.mark.parametrize(
    ("new", "left"),
    [
        (pool("a", 2), [2]),
        (pool("a", 1, address="127.0.0.1:9"), [1]),
        (pool("a", 2, layout="bb"), [1, 2]),
        (pool("b", 2), [1, 2]),
        (pool("b", 2, address="127.0.0.1:1001"), [2]),
    ],
    ids=["new epoch", "same epoch elsewhere", "another rank", "another instance", "same address"],
)
def test_pools_register_replaces_pools_of_the_same_place(
    pools: Pools, new: PoolInfo, left: list[int]
) -> None:
    before = pools.register(pool("a", 1))
    after = pools.register(new)
    assert epochs(pools) == left
    assert after.version > before.version


def test_pools_refuse_a_replaced_pool(cluster: InstanceRegistry, pools: Pools) -> None:
    one, two, three = pool("a", 1), pool("a", 2), pool("a", 3)
    for info in (one, two, three):
        assert isinstance(answer(cluster, pools, RegisterPool(info)), Members)
    for info in (one, two):
        refused = answer(cluster, pools, RegisterPool(info))
        assert isinstance(refused, Refused)
        assert "an instance id each" in refused.reason
    assert isinstance(answer(cluster, pools, RegisterPool(three)), Members)
    assert epochs(pools) == [3]
    answer(cluster, pools, DeregisterPool(three.epoch))
    assert isinstance(answer(cluster, pools, RegisterPool(one)), Members)
    assert epochs(pools) == [1]


def test_pools_accept_a_pool_that_moved(cluster: InstanceRegistry, pools: Pools) -> None:
    answer(cluster, pools, RegisterPool(pool("a", 1)))
    answer(cluster, pools, RegisterPool(pool("a", 1, address="127.0.0.1:9")))
    assert isinstance(answer(cluster, pools, RegisterPool(pool("a", 1))), Members)


def test_pools_forget_a_silent_pool(pools: Pools, clock: FakeClock) -> None:
    version = pools.register(pool("a", 1)).version
    version = pools.register(pool("b", 2)).version
    clock.advance(DEFAULTS.forget_heartbeats - 0.5)
    assert pools.heartbeat(Epoch(1), version) is not None
    clock.advance(1.0)
    pools.forget_silent()
    assert epochs(pools) == [1]
    assert pools.heartbeat(Epoch(2), version) is None
    members = pools.heartbeat(Epoch(1), version)
    assert members is not None
    assert members.pools == (pool("a", 1),)


def test_pools_deregister_ignores_unknown_epochs(pools: Pools) -> None:
    pools.register(pool("a", 1))
    pools.deregister(Epoch(7))
    assert epochs(pools) == [1]


def test_pools_version_differs_after_a_router_restart() -> None:
    lives = [Pools(ClusterConfig(heartbeat_secs=1.0), FakeClock()).register(pool()).version for _ in range(2)]
    assert lives[0] != lives[1]


def test_control_answers_the_messages_of_pools(cluster: InstanceRegistry, pools: Pools) -> None:
    one = pool()
    assert answer(cluster, pools, PoolHeartbeat(one.epoch, 0)) == Unknown()
    members = answer(cluster, pools, RegisterPool(one))
    assert isinstance(members, Members)
    unchanged = Members(1.0, members.version, None)
    assert answer(cluster, pools, PoolHeartbeat(one.epoch, members.version)) == unchanged
    assert answer(cluster, pools, DeregisterPool(one.epoch)) == Done()
    assert answer(cluster, pools, DeregisterPool(one.epoch)) == Done()
    assert answer(cluster, pools, PoolHeartbeat(one.epoch, members.version)) == Unknown()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (RegisterPool(pool(epoch=0)), "epoch"),
        (RegisterPool(pool(role=Role.PREFILL)), "bootstrap address"),
        (Register(InstanceInfo(InstanceId("m"), Epoch(1), Role.MEMORY, "http://m:1")), "its pool only"),
    ],
)
def test_control_refuses_invalid_pools(
    cluster: InstanceRegistry, pools: Pools, message: Message, reason: str
) -> None:
    refused = answer(cluster, pools, message)
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert not pools.members()
    assert not cluster.members()


def test_memory_pool_registers_without_an_instance(cluster: InstanceRegistry, pools: Pools) -> None:
    assert isinstance(
        answer(cluster, pools, RegisterPool(pool("m", 1, role=Role.MEMORY, layout=""))), Members
    )
    assert cluster.members() == []
    assert cluster.snapshot.all() == ()


def joins(name: str, caching: CachingMode, epoch: int) -> list[Message]:
    """An instance or a pool with that value."""
    return [Register(decode(name, caching, epoch)), RegisterPool(pool(name, epoch, caching=caching))]


@pytest.mark.parametrize("first", joins("first", FULL, 1), ids=["instance", "pool"])
@pytest.mark.parametrize("second", joins("second", BOTH, 2), ids=["instance", "pool"])
def test_first_member_decides_the_caching_mode(
    cluster: InstanceRegistry, pools: Pools, first: Message, second: Message
) -> None:
    answer(cluster, pools, first)
    assert agreed_caching(cluster, pools) is FULL
    refused = answer(cluster, pools, second)
    assert isinstance(refused, Refused)
    assert "second has --caching both" in refused.reason
    assert "restart it with --caching full" in refused.reason
    answer(cluster, pools, Deregister(InstanceId("first"), Epoch(1)))
    answer(cluster, pools, DeregisterPool(Epoch(1)))
    assert agreed_caching(cluster, pools) is None
    assert isinstance(answer(cluster, pools, second), Accepted | Members)
    assert agreed_caching(cluster, pools) is BOTH


def test_lone_instance_may_change_the_caching_mode(cluster: InstanceRegistry, pools: Pools) -> None:
    answer(cluster, pools, RegisterPool(pool("a", 1)))
    answer(cluster, pools, Register(decode("a", FULL, 2)))
    assert isinstance(answer(cluster, pools, RegisterPool(pool("a", 3, caching=BOTH))), Members)
    assert isinstance(answer(cluster, pools, Register(decode("a", BOTH, 4))), Accepted)
    assert agreed_caching(cluster, pools) is BOTH


def test_static_servers_do_not_decide_the_caching_mode(clock: FakeClock, pools: Pools) -> None:
    static = InstanceInfo(InstanceId("http://s:1"), STATIC_EPOCH, Role.DECODE, "http://s:1")
    cluster = InstanceRegistry(ClusterConfig(heartbeat_secs=1.0, static=(static,)), clock)
    assert agreed_caching(cluster, pools) is None
    assert isinstance(answer(cluster, pools, Register(decode("a", BOTH))), Accepted)


async def ask(client: ControlClient, message: Message) -> Message:
    return await asyncio.to_thread(client.request, message, timeout_s=5.0)


async def test_pools_learn_of_each_other_over_the_control_plane() -> None:
    async with staged() as stage:
        client = ControlClient(stage.router.control_address)
        one, two = pool("a", 1, role=Role.PREFILL, bootstrap="h:8998"), pool("b", 2)
        assert await ask(client, PoolHeartbeat(one.epoch, 0)) == Unknown()
        first = await ask(client, RegisterPool(one))
        assert isinstance(first, Members)
        await ask(client, RegisterPool(two))
        news = await ask(client, PoolHeartbeat(one.epoch, first.version))
        assert isinstance(news, Members)
        assert news.pools == (one, two)
        assert await ask(client, DeregisterPool(two.epoch)) == Done()
        news = await ask(client, PoolHeartbeat(one.epoch, news.version))
        assert isinstance(news, Members)
        assert news.pools == (one,)
        client.close()


async def pools_of(stage: Stage) -> list[dict[str, Any]]:
    return list((await stage.get("/workers"))[1]["pools"])


async def test_workers_page_drops_a_silent_pool() -> None:
    async with staged(heartbeat_secs=0.01) as stage:
        assert (await stage.get("/workers"))[1]["caching"] is None
        client = ControlClient(stage.router.control_address)
        await ask(client, RegisterPool(pool("m", 255, role=Role.MEMORY, layout="")))
        client.close()
        await stage.until(lambda: not stage.router.pools.members())
        assert await pools_of(stage) == []


async def test_workers_page_shows_pools_and_the_caching_mode() -> None:
    async with staged() as stage, FakeWorker(Role.COLOCATED) as worker:
        stage.router.cluster.register(info_of(worker))
        stage.router.pools.register(pool("p", 255, role=Role.PREFILL, bootstrap="h:8998"))
        tiers = (TierBlocks("dram", 3, 4, 8), TierBlocks("hbm", 2))
        assert stage.router.pools.heartbeat(Epoch(255), 0, tiers) is not None
        page = (await stage.get("/workers"))[1]
        assert page["caching"] == page["workers"][0]["caching"] == "full"
        (shown,) = page["pools"]
        assert shown.pop("age_s") >= 0
        assert shown == {
            "instance_id": "p",
            "epoch": "00000000000000ff",
            "role": "prefill",
            "caching": "full",
            "address": "127.0.0.1:1255",
            "layout": "aa",
            "bootstrap": "h:8998",
            "tiers": {
                "dram": {"cached_blocks": 3, "free_blocks": 4, "blocks": 8},
                "hbm": {"cached_blocks": 2, "free_blocks": None, "blocks": None},
            },
        }

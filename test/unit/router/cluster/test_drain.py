"""Draining: which pools get the blocks, when, and the status that is reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.drain import EvacuationResult, evacuation_targets
from memserve.router.cluster.member import State
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.link import ControlServer
from memserve.wire.messages import Done, Message, PoolInfo, Role
from memserve.wire.peer_messages import Evacuate, Evacuated, EvacuationTarget

from ..harness import DEADLINE_S, Stage, info_of, staged

ANY = {"text": "a", "sampling_params": {"max_new_tokens": 2}}


def pool(
    name: str, role: Role = Role.PREFILL, *, epoch: int = 7, layout: str = "aa", address: str = "h:1"
) -> PoolInfo:
    return PoolInfo(InstanceId(name), Epoch(epoch), role, CachingMode.FULL, address, layout)


POOLS = (
    pool("p0"),
    pool("p1"),
    pool("p2", layout="bb"),
    pool("p3"),
    pool("d0", Role.DECODE),
    pool("m", Role.MEMORY, layout=""),
    pool("c/dp0", Role.COLOCATED),
)
READY = {InstanceId(name) for name in ("p0", "p1", "p2", "d0", "c")}


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (pool("p0"), ["p1", "m", "c/dp0"]),
        (pool("d0", Role.DECODE), ["p0", "p1", "m", "c/dp0"]),
        (pool("c/dp1", Role.COLOCATED), ["p0", "p1", "m"]),
        (pool("p9", layout="cc"), ["m"]),
    ],
)
def test_evacuation_targets_are_pools_that_can_reuse_the_blocks(own: PoolInfo, names: list[str]) -> None:
    """The same layout; no decode's DRAM, no ranks of one server, no draining or down instances."""
    assert [target.name for target in evacuation_targets(own, own.layout, POOLS, READY)] == names


def test_evacuation_does_not_count_its_own_blocks_as_known() -> None:
    first = EvacuationResult(10, 100, 3, 2, 1.0, "late")
    assert first.then(EvacuationResult(1, 10, 13, 0, 0.5)) == EvacuationResult(11, 110, 3, 0, 1.5)


class FakePool:
    """A control server that evacuates as it is told."""

    def __init__(self, *answers: Message) -> None:
        self.asked: list[Message] = []
        self._answers = list(answers)
        self.server = ControlServer("127.0.0.1", 0, self._answer)

    def _answer(self, message: Message) -> Message:
        self.asked.append(message)
        return self._answers.pop(0)


@asynccontextmanager
async def with_pools(*answers: Message, **settings: Any) -> AsyncIterator[tuple[Stage, FakePool]]:
    """Two servers, the first of which has a pool with these answers."""
    one, other = FakeWorker(), FakeWorker()
    fake = FakePool(*answers)
    try:
        async with staged(one, other, **settings) as stage:
            for epoch, worker, address in ((6, one, fake.server.address), (7, other, "other:1")):
                info = pool(str(info_of(worker).instance_id), Role.COLOCATED, epoch=epoch, address=address)
                stage.router.pools.register(info)
            yield stage, fake
    finally:
        fake.server.close()


async def drain(stage: Stage, query: str = "") -> tuple[int, Any]:
    return await stage.post(f"/workers/{info_of(stage.colocated).instance_id}/drain{query}", None)


async def test_drain_status_reports_the_evacuated_blocks() -> None:
    async with with_pools(Evacuated(5, 500, 2, 1, "late"), drain_evacuate_secs=3.0) as (stage, fake):
        status, answer = await drain(stage)
        assert (status, answer["drained"]) == (200, True)
        evacuated = answer["evacuated"]
        assert evacuated.pop("seconds") >= 0
        assert evacuated == {"blocks": 5, "bytes": 500, "known_elsewhere": 2, "left": 1, "reason": "late"}
        other = info_of(stage.workers[Role.COLOCATED][1]).instance_id
        assert fake.asked == [Evacuate(b"\xaa", (EvacuationTarget(other, "other:1", Epoch(7)),), 3.0)]
        # Once is enough, until it has served again.
        assert (await drain(stage))[1]["evacuated"]["blocks"] == 5
        assert len(fake.asked) == 1


async def test_drain_evacuates_again_after_the_last_request() -> None:
    async with with_pools(Evacuated(5, 50, 0, 0), Evacuated(1, 10, 5, 0)) as (stage, fake):
        gate = asyncio.Event()
        for worker in stage.workers[Role.COLOCATED]:
            worker.script = Script(gates={1: gate})
        begun = [asyncio.create_task(stage.post("/generate", ANY)) for _ in range(2)]
        await stage.colocated.until(lambda w: w.requests)
        draining = asyncio.create_task(drain(stage))
        await stage.until(lambda: len(fake.asked) == 1)
        assert not draining.done()
        gate.set()
        answer = (await draining)[1]
        assert (answer["drained"], answer["evacuated"]["blocks"]) == (True, 6)
        assert len(fake.asked) == 2
        assert [status for status, _ in await asyncio.gather(*begun)] == [200, 200]


async def test_drain_completes_although_the_pool_does_not_evacuate() -> None:
    async with with_pools(Done()) as (stage, _):
        answer = (await drain(stage))[1]
        assert answer["drained"]
        assert answer["evacuated"]["blocks"] == 0
        assert answer["evacuated"]["reason"]


async def test_drain_can_be_polled_and_ended() -> None:
    async with with_pools(Evacuated(5, 50, 0, 0), Evacuated(4, 40, 0, 0)) as (stage, fake):
        name = info_of(stage.colocated).instance_id
        status, answer = await drain(stage, "?wait=0")
        assert (status, answer["drained"], answer["evacuated"]) == (202, False, None)
        async with asyncio.timeout(DEADLINE_S):
            while not (await stage.get(f"/workers/{name}"))[1]["drained"]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        async with stage.client.delete(stage.url(f"/workers/{name}/drain")) as response:
            answer = await response.json()
        assert (answer["state"], answer["evacuated"]) == (State.READY, None)
        assert (await drain(stage))[1]["evacuated"]["blocks"] == 4
        assert len(fake.asked) == 2


async def test_memory_instance_is_evacuated_per_layout() -> None:
    async with with_pools() as (stage, _):
        fake = FakePool(Evacuated(5, 50, 1, 0), Evacuated(0, 0, 0, 0, "there is no pool of such blocks here"))
        other = pool("p", epoch=9, layout="bb", address="h:9")
        memory = pool("m", Role.MEMORY, epoch=8, layout="", address=fake.server.address)
        for info in (other, memory):
            stage.router.pools.register(info)
        status, answer = await stage.post("/workers/m/drain", None)
        assert (status, answer["drained"], answer["evacuated"]["blocks"]) == (200, True, 5)
        asked = {message.layout: message for message in fake.asked if isinstance(message, Evacuate)}
        names = [str(info_of(worker).instance_id) for worker in stage.workers[Role.COLOCATED]]
        assert [target.name for target in asked[b"\xaa"].targets] == names
        assert asked[b"\xbb"].targets == (), "its server is not there"
        fake.server.close()


async def test_drain_skips_evacuation_if_disabled_or_without_pool() -> None:
    async with with_pools(drain_evacuate_secs=0.0) as (stage, fake):
        assert (await drain(stage))[1]["evacuated"] is None
        assert not fake.asked

"""Role changes: drain, restart and return; rejection; time limits."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from memserve.router.cluster.control import answer
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Accepted, Deregister, Heartbeat, InstanceInfo, Register, Role

from ..harness import DEADLINE_S, Stage, info_of, staged

ANY = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
ROLES = (Role.PREFILL, Role.DECODE, Role.COLOCATED)


def able(worker: FakeWorker, epoch: int = 1, roles: tuple[Role, ...] = ROLES) -> InstanceInfo:
    """As a server registers that can become others."""
    info = info_of(worker, epoch, name=f"at-{worker.port}")
    return msgspec.structs.replace(info, roles=tuple(one for one in roles if one is not worker.role))


async def register(stage: Stage, *infos: InstanceInfo) -> None:
    for info in infos:
        assert isinstance(answer(stage.router.cluster, stage.router.pools, Register(info)), Accepted)
    await stage.until(lambda: len(stage.router.cluster.snapshot.all()) >= len(infos))


async def change(
    stage: Stage, info: InstanceInfo, role: str, query: str = "", **body: Any
) -> tuple[int, Any]:
    return await stage.post(f"/workers/{info.instance_id}/role{query}", {"role": role, **body})


async def shown(stage: Stage, info: InstanceInfo) -> Any:
    return (await stage.get(f"/workers/{info.instance_id}"))[1]


def beat(stage: Stage, info: InstanceInfo) -> Role | None:
    """What the router wants of it."""
    told = answer(stage.router.cluster, stage.router.pools, Heartbeat(info.instance_id, info.epoch))
    assert isinstance(told, Accepted)
    return told.become


async def begin_anew(stage: Stage, worker: FakeWorker, role: Role) -> InstanceInfo:
    """As the process does: leave, end, come back."""
    old = able(worker)
    answer(stage.router.cluster, stage.router.pools, Deregister(old.instance_id, old.epoch))
    await worker.kill()
    worker.role = role
    await worker.start()
    new = able(worker, epoch=2)
    answer(stage.router.cluster, stage.router.pools, Register(new))
    return new


def three() -> tuple[FakeWorker, FakeWorker, FakeWorker]:
    return FakeWorker(Role.PREFILL), FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)


async def test_prefill_changes_to_decode_while_others_serve() -> None:
    workers = three()
    for worker in workers:
        await worker.start()
    async with staged() as stage:
        infos = [able(worker) for worker in workers]
        await register(stage, *infos)
        gate = asyncio.Event()
        for worker in workers:
            worker.script = Script(gates={1: gate})
        begun = [asyncio.create_task(stage.post("/generate", ANY)) for _ in range(2)]
        await workers[0].until(lambda w: w.requests)
        changing = asyncio.create_task(change(stage, infos[0], "decode"))
        await stage.until(lambda: not stage.router.cluster.snapshot.prefills[1:])
        assert beat(stage, infos[0]) is None, "it has a request to end"
        assert (await shown(stage, infos[0]))["role_change"]["stage"] == "draining"
        assert (await change(stage, infos[0], "decode"))[0] == 409
        gate.set()
        assert [status for status, _ in await asyncio.gather(*begun)] == [200, 200]
        await stage.until(lambda: beat(stage, infos[0]) is Role.DECODE)
        assert (await shown(stage, infos[0]))["role_change"]["stage"] == "restarting"
        assert not changing.done()
        for worker in workers:
            worker.script = Script()
        assert (await stage.post("/generate", ANY))[0] == 200
        new = await begin_anew(stage, workers[0], Role.DECODE)
        status, said = await changing
        assert (status, said["stage"], said["role"]) == (200, "done", "decode")
        assert said["drain"]["drained"]
        assert beat(stage, new) is None
        assert len(stage.router.cluster.snapshot.decodes) == 2
        assert (await stage.post("/generate", ANY))[0] == 200
    for worker in workers:
        await worker.kill()


async def test_role_change_is_rejected_with_its_reason() -> None:
    workers = three()
    for worker in workers:
        await worker.start()
    async with staged() as stage:
        infos = [able(workers[0]), able(workers[1], roles=()), able(workers[2])]
        await register(stage, *infos)
        named = FakeWorker()
        await named.start()
        await stage.post("/workers", {"url": named.url})
        url = info_of(named, name=named.url)
        for info, role, reason in (
            (infos[1], "decode", "no choice"),
            (url, "prefill", "--disaggregation-mode"),
        ):
            status, said = await change(stage, info, role)
            assert (status, reason in said["error"]["message"]) == (409, True), said
        # With the colocated one others can serve; without it nobody could meanwhile.
        await stage.client.delete(stage.url(f"/workers/{url.instance_id.replace('/', '%2F')}"))
        await stage.until(lambda: not stage.router.cluster.snapshot.colocated)
        status, said = await change(stage, infos[2], "prefill")
        assert (status, "no decode server" in said["error"]["message"]) == (409, True), said
        assert (await change(stage, infos[2], "decode"))[1]["stage"] == "done"
        assert (await change(stage, infos[2], "memory"))[0] == 400
        status, said = await change(stage, infos[2], "prefill", "?wait=0", force=True)
        assert (status, said["stage"]) == (202, "draining")
        await named.kill()
    for worker in workers:
        await worker.kill()


@pytest.mark.parametrize("comes_back", [True, False])
async def test_role_change_fails_after_its_time_limit(comes_back: bool) -> None:
    workers = three()
    for worker in workers:
        await worker.start()
    async with staged() as stage:
        infos = [able(worker) for worker in workers]
        await register(stage, *infos)
        if comes_back:  # as what it was: somebody has restarted it meanwhile
            changing = asyncio.create_task(change(stage, infos[0], "decode", timeout_s=DEADLINE_S))
            await stage.until(lambda: beat(stage, infos[0]) is Role.DECODE)
            await begin_anew(stage, workers[0], Role.PREFILL)
            said = (await changing)[1]
            assert (said["stage"], said["reason"]) == ("failed", "it has come back as prefill")
        else:
            said = (await change(stage, infos[0], "decode", timeout_s=0.1))[1]
            assert (said["stage"], said["reason"]) == ("failed", "it has not come back in time")
            assert beat(stage, infos[0]) is None
            assert (await shown(stage, infos[0]))["state"] == "ready"
    for worker in workers:
        await worker.kill()


async def test_role_change_fails_if_requests_do_not_end() -> None:
    workers = three()
    for worker in workers:
        await worker.start()
    async with staged() as stage:
        infos = [able(worker) for worker in workers]
        await register(stage, *infos)
        gate = asyncio.Event()
        for worker in workers:
            worker.script = Script(gates={0: gate})
        begun = [asyncio.create_task(stage.post("/generate", ANY)) for _ in range(2)]
        await workers[0].until(lambda w: w.requests)
        said = (await change(stage, infos[0], "decode", timeout_s=0.1))[1]
        assert (said["stage"], said["reason"]) == ("failed", "its requests have not ended in time")
        assert (await shown(stage, infos[0]))["state"] == "ready"
        assert beat(stage, infos[0]) is None
        gate.set()
        assert [status for status, _ in await asyncio.gather(*begun)] == [200, 200]
    for worker in workers:
        await worker.kill()

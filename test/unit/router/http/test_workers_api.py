"""Instances are listed, added, drained and removed over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest
import yarl

from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch
from memserve.router.cluster.control import answer
from memserve.router.cluster.discovery.static import STATIC_EPOCH
from memserve.router.cluster.member import State
from memserve.router.request import GenerationRequest
from memserve.router.tokenization.token_records import Tokens
from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import (
    Heartbeat,
    InstanceInfo,
    Load,
    PoolHeartbeat,
    PoolInfo,
    RegisterPool,
    Role,
    TierBlocks,
)

from ..harness import Stage, info_of, pair, staged

ANY = {"text": "a", "sampling_params": {"max_new_tokens": 2}}


async def ask(stage: Stage, method: str, path: str, body: object = None, **kwargs: Any) -> tuple[int, Any]:
    """Status and parsed answer; `path` is sent unchanged."""
    url = yarl.URL(stage.url(path), encoded=True)
    async with stage.client.request(method, url, json=body, **kwargs) as response:
        return response.status, await response.json()


def name_of(worker: FakeWorker) -> str:
    return str(info_of(worker).instance_id)


def path_of(worker: FakeWorker) -> str:
    return f"/workers/{name_of(worker)}"


def state_of(stage: Stage, name: str) -> State:
    member = stage.router.cluster.find(name)
    assert member is not None
    return member.state


def named(worker: FakeWorker) -> InstanceInfo:
    info = info_of(worker, name=worker.url)
    return InstanceInfo(info.instance_id, STATIC_EPOCH, info.role, info.url, info.bootstrap_port)


async def test_a_draining_server_finishes_its_requests_and_gets_no_new_ones() -> None:
    one, other = FakeWorker(), FakeWorker()
    async with staged(one, other) as stage:
        gate = asyncio.Event()
        one.script = other.script = Script(gates={1: gate})
        begun = [asyncio.create_task(stage.post("/generate", ANY)) for _ in range(2)]
        await asyncio.gather(*(worker.until(lambda w: w.requests) for worker in (one, other)))
        draining = asyncio.create_task(ask(stage, "POST", path_of(one) + "/drain"))
        await stage.until(lambda: state_of(stage, name_of(one)) is State.DRAINING)
        other.script = Script()
        for _ in range(4):
            assert (await stage.post("/generate", ANY))[0] == 200
        assert len(one.requests) == 1
        assert (await ask(stage, "GET", path_of(one)))[1]["running"] == 1
        assert not draining.done()
        gate.set()
        status, answer = await draining
        assert status == 200
        assert answer == {
            "instance_id": name_of(one), "state": "draining", "drained": True, "running": 0,
            "evacuated": None,
        }  # fmt: skip
        assert [status for status, _ in await asyncio.gather(*begun)] == [200, 200]

        status, answer = await ask(stage, "DELETE", path_of(one) + "/drain")
        assert (status, answer["state"]) == (200, "ready")
        one.script = Script()
        while len(one.requests) == 1:
            assert (await stage.post("/generate", ANY))[0] == 200


async def test_a_drain_is_answered_after_its_timeout() -> None:
    async with staged(FakeWorker()) as stage:
        gate = asyncio.Event()
        stage.colocated.script = Script(gates={0: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await stage.colocated.until(lambda w: w.requests)
        path = path_of(stage.colocated) + "/drain"
        for status, timeout in ((200, {"timeout_s": 0.01}), (202, None)):
            where = path if status == 200 else path + "?wait=0"
            answered, answer = await ask(stage, "POST", where, timeout)
            assert (answered, answer["drained"], answer["running"]) == (status, False, 1)
        await ask(stage, "DELETE", path)
        waiting = asyncio.create_task(ask(stage, "POST", path))
        await stage.until(lambda: state_of(stage, name_of(stage.colocated)) is State.DRAINING)
        await ask(stage, "DELETE", path)
        answer = (await waiting)[1]
        assert (answer["state"], answer["drained"], answer["running"]) == ("ready", False, 1)
        gate.set()
        assert (await request)[0] == 200


async def test_a_prefill_is_drained_once_its_requests_are_only_decoding() -> None:
    async with staged(*pair()) as stage:
        gate = asyncio.Event()
        stage.decode.script = Script(gates={1: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await asyncio.gather(
            *(worker.until(lambda w: w.requests) for worker in (stage.prefill, stage.decode))
        )
        status, answer = await ask(stage, "POST", path_of(stage.prefill) + "/drain")
        assert (status, answer["drained"]) == (200, True)
        _, answer = await ask(stage, "POST", path_of(stage.decode) + "/drain", {"timeout_s": 0})
        assert (answer["drained"], answer["running"]) == (False, 1)
        gate.set()
        assert (await request)[0] == 200
        assert (await ask(stage, "POST", path_of(stage.decode) + "/drain"))[1]["drained"]


async def test_a_request_in_tokenization_is_not_sent_to_a_server_drained_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, tokens_of, held = asyncio.Event(), Tokenizers.tokens_of, asyncio.Event()

    async def tokens_in_time(self: Tokenizers, call: GenerationRequest, model: str | None) -> Tokens:
        held.set()
        await gate.wait()
        return await tokens_of(self, call, model)

    monkeypatch.setattr(Tokenizers, "tokens_of", tokens_in_time)
    async with staged(FakeWorker()) as stage:
        request = asyncio.create_task(stage.post("/generate", ANY))
        await held.wait()
        assert (await ask(stage, "POST", path_of(stage.colocated) + "/drain"))[1]["drained"]
        gate.set()
        assert (await request)[0] == 503
        assert not stage.colocated.requests


async def test_readiness_counts_draining_instances_apart() -> None:
    async with staged(*pair()) as stage:
        await ask(stage, "POST", path_of(stage.prefill) + "/drain")
        status, page = await stage.get("/readiness")
        assert (status, page["reason"]) == (503, "no prefill server is ready")
        assert (page["prefill"], page["decode"], page["draining"], page["not_ready"]) == (0, 1, 1, {})
        async with stage.client.get(stage.url("/metrics")) as response:
            line = 'memserve_router_instances{role="prefill",state="draining"} 1.0'
            assert line in (await response.text()).splitlines()
        status, answer = await stage.post("/generate", ANY)
        assert (status, answer["error"]["retryable"]) == (503, True)


async def test_abort_request_reaches_draining_instances() -> None:
    gate = asyncio.Event()
    async with staged(FakeWorker(script=Script(gates={0: gate}))) as stage:
        request = asyncio.create_task(stage.post("/generate", {**ANY, "rid": "x"}))
        await stage.colocated.until(lambda w: w.requests)
        await ask(stage, "POST", path_of(stage.colocated) + "/drain")
        for rid in ("x", "y"):
            async with stage.client.post(stage.url("/abort_request"), json={"rid": rid}) as response:
                assert response.status == 200
        await stage.colocated.until(lambda w: w.aborts)
        assert stage.colocated.aborts == stage.colocated.requests[0].rids
        gate.set()
        await request


async def test_a_drain_ends_when_the_draining_process_goes() -> None:
    async with staged(FakeWorker()) as stage:
        gate = asyncio.Event()
        stage.colocated.script = Script(gates={0: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await stage.colocated.until(lambda w: w.requests)
        draining = asyncio.create_task(ask(stage, "POST", path_of(stage.colocated) + "/drain"))
        await stage.until(lambda: state_of(stage, name_of(stage.colocated)) is State.DRAINING)
        info = info_of(stage.colocated)
        stage.router.cluster.deregister(info.instance_id, info.epoch)
        assert (await draining)[1]["state"] == "gone"
        gate.set()
        assert (await request)[0] == 200


async def test_a_static_server_stays_draining_through_probes() -> None:
    worker = FakeWorker()
    await worker.start()
    async with staged(static=(named(worker),), health_check_interval_secs=0.01) as stage:
        await stage.until(stage.is_ready)
        path = f"/workers/{quote(worker.url, safe='')}"
        assert (await ask(stage, "POST", path + "/drain"))[1]["drained"]
        await worker.kill()
        await stage.until(lambda: state_of(stage, worker.url) is State.DOWN)
        assert (await ask(stage, "GET", path))[1]["draining"]
        await worker.start()
        await stage.until(lambda: state_of(stage, worker.url) is State.DRAINING)
        assert (await stage.post("/generate", ANY))[0] == 503
        await ask(stage, "DELETE", path + "/drain")
        assert (await stage.post("/generate", ANY))[0] == 200
    await worker.kill()


@pytest.mark.parametrize("quoted", [True, False])
async def test_stock_servers_can_be_added_and_removed(quoted: bool) -> None:
    prefill, decode = pair()
    async with staged() as stage, prefill, decode:
        body = {"url": prefill.url + "/", "role": "prefill", "bootstrap_port": 9000}
        for expected in (201, 200):
            status, answer = await ask(stage, "POST", "/workers", body)
            assert (status, answer["instance_id"]) == (expected, prefill.url)
            assert (answer["role"], answer["bootstrap_port"]) == ("prefill", 9000)
        assert (await ask(stage, "POST", "/workers", {"url": decode.url, "role": "decode"}))[0] == 201
        await stage.until(stage.is_ready)
        assert (await stage.post("/generate", ANY))[0] == 200

        path = "/workers/" + (quote(decode.url, safe="") if quoted else decode.url)
        status, answer = await ask(stage, "GET", path)
        assert (status, answer["url"], answer["state"]) == (200, decode.url, "ready")
        status, answer = await ask(stage, "DELETE", path)
        assert (status, answer["removed"], answer["drained"]) == (200, True, True)
        assert not stage.is_ready()
        status, answer = await ask(stage, "GET", path)
        assert (status, answer["error"]["param"]) == (404, "id")


async def test_add_worker_remove_worker_and_list_workers_work() -> None:
    async with staged() as stage, FakeWorker() as worker:
        query = f"?url={quote(worker.url, safe='')}"
        assert (await ask(stage, "POST", "/add_worker" + query))[0] == 201
        await stage.until(stage.is_ready)
        assert await ask(stage, "GET", "/list_workers") == (200, {"urls": [worker.url]})
        assert (await stage.post("/generate", ANY))[0] == 200
        assert (await ask(stage, "POST", "/remove_worker" + query))[0] == 200
        assert await ask(stage, "GET", "/list_workers") == (200, {"urls": []})
        for path in ("/add_worker", "/remove_worker"):
            status, answer = await ask(stage, "POST", path)
            assert (status, answer["error"]["param"]) == (400, "url")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "h:1"}, "url"),
        ({"url": "http://h:99999"}, "url"),
        ({"url": 1}, "url"),
        ({}, "url"),
        ({"url": "http://h:1", "role": "memory"}, "role"),
        ({"url": "http://h:1", "role": "prefill", "bootstrap_port": 0}, "bootstrap_port"),
        ({"url": "http://h:1", "role": "decode", "bootstrap_port": 8998}, "bootstrap_port"),
        ({"url": "http://h:1", "rolle": "decode"}, "rolle"),
        ([], None),
    ],
)
async def test_an_invalid_server_is_not_added(body: object, field: str | None) -> None:
    async with staged() as stage:
        status, answer = await ask(stage, "POST", "/workers", body)
        assert (status, answer["error"]["param"]) == (400, field)
        assert not stage.router.cluster.members()


@pytest.mark.parametrize("body", [{"timeout_s": -1}, {"timeout_s": "x"}, {"timeout_s": 1e9}])
async def test_an_invalid_timeout_drains_no_instance(body: object) -> None:
    async with staged(FakeWorker()) as stage:
        status, answer = await ask(stage, "POST", path_of(stage.colocated) + "/drain", body)
        assert (status, answer["error"]["param"]) == (400, "timeout_s")
        status, answer = await ask(stage, "DELETE", path_of(stage.colocated) + "?timeout_s=nan")
        assert (status, answer["error"]["param"]) == (400, "timeout_s")
        assert stage.is_ready()


async def test_a_server_cannot_be_added_in_another_role_and_a_registered_one_not_removed() -> None:
    async with staged(FakeWorker()) as stage:
        await ask(stage, "POST", "/workers", {"url": "http://127.0.0.1:1", "role": "prefill"})
        for role, port, field in (("decode", None, "role"), ("prefill", 1, "bootstrap_port")):
            body = {"url": "http://127.0.0.1:1", "role": role, "bootstrap_port": port}
            status, answer = await ask(stage, "POST", "/workers", body)
            assert (status, answer["error"]["param"]) == (409, field)
        for path in (path_of(stage.colocated), "/workers/" + stage.colocated.url):
            status, answer = await ask(stage, "DELETE", path)
            assert status == 409
            assert "/drain" in answer["error"]["message"]
        assert stage.is_ready()
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/drain"), ("DELETE", "/drain")):
            assert (await ask(stage, method, "/workers/nobody" + path))[0] == 404


async def test_a_removal_waits_for_running_requests_up_to_its_timeout() -> None:
    worker = FakeWorker()
    await worker.start()
    async with staged(static=(named(worker),)) as stage:
        await stage.until(stage.is_ready)
        gate = asyncio.Event()
        worker.script = Script(gates={1: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await worker.until(lambda w: w.requests)
        status, answer = await ask(stage, "DELETE", f"/workers/{worker.url}?timeout_s=0.01")
        assert (status, answer["drained"], answer["running"]) == (200, False, 1)
        assert not stage.router.cluster.members()
        gate.set()
        assert (await request)[0] == 200
    await worker.kill()


async def test_a_server_undrained_during_its_removal_stays() -> None:
    worker = FakeWorker()
    await worker.start()
    async with staged(static=(named(worker),)) as stage:
        await stage.until(stage.is_ready)
        gate = asyncio.Event()
        worker.script = Script(gates={1: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await worker.until(lambda w: w.requests)
        removing = asyncio.create_task(ask(stage, "DELETE", f"/workers/{worker.url}"))
        await stage.until(lambda: state_of(stage, worker.url) is State.DRAINING)
        await ask(stage, "DELETE", f"/workers/{worker.url}/drain")
        assert (await removing)[0] == 409
        assert stage.is_ready()
        gate.set()
        assert (await request)[0] == 200
    await worker.kill()


async def test_web_pages_cannot_change_workers() -> None:
    async with staged() as stage:
        headers = {"Origin": "http://elsewhere"}
        status, _ = await ask(stage, "POST", "/add_worker?url=http://127.0.0.1:1", headers=headers)
        assert status == 403
        assert not stage.router.cluster.members()


async def restarted(stage: Stage, worker: FakeWorker, statuses: list[int]) -> None:
    """Replace the process of `worker` after a drain, with a pause between."""
    await worker.until(lambda w: w.requests)
    status, answer = await ask(stage, "POST", path_of(worker) + "/drain")
    assert (status, answer["drained"]) == (200, True)
    await worker.until(lambda w: all(one.finished for one in w.requests))
    await worker.kill()
    num_before, num_asked = len(worker.requests), len(statuses)
    await stage.until(lambda: len(statuses) > num_asked + 16)
    await worker.start()
    stage.router.cluster.register(info_of(worker, epoch=2))
    await worker.until(lambda w: len(w.requests) > num_before)
    assert state_of(stage, name_of(worker)) is State.READY


async def test_a_rolling_restart_loses_no_request() -> None:
    workers = [FakeWorker(role) for role in (Role.PREFILL, Role.DECODE) for _ in range(2)]
    async with staged(*workers, retry_max_retries=0) as stage:
        statuses: list[int] = []
        is_over = asyncio.Event()

        async def keep_asking(number: int) -> None:
            while not is_over.is_set():
                if number % 2:
                    statuses.append((await stage.post("/generate", ANY))[0])
                else:
                    events = await stage.events("/generate", {**ANY, "stream": True})
                    assert events[-1] == b"data: [DONE]"
                    statuses.append(500 if b'"error"' in b"".join(events) else 200)

        asking = [asyncio.create_task(keep_asking(number)) for number in range(8)]
        for worker in workers:
            await restarted(stage, worker, statuses)
        is_over.set()
        await asyncio.gather(*asking)
        assert set(statuses) == {200}
        assert {one.info.epoch for one in stage.router.cluster.members()} == {Epoch(2)}


async def test_loads_in_heartbeats_are_shown_and_exported() -> None:
    async with staged(FakeWorker(), stuck_secs=5.0) as stage:
        worker = stage.colocated
        info, cluster, pools = info_of(worker), stage.router.cluster, stage.router.pools
        load = Load(3, 2, 50, 200, 7.5)
        pool = PoolInfo(info.instance_id, Epoch(5), Role.COLOCATED, CachingMode.FULL, "h:1", "aa")
        answer(cluster, pools, Heartbeat(info.instance_id, info.epoch, load))
        answer(cluster, pools, RegisterPool(pool))
        tiers = (TierBlocks("dram", 30, 4, 34), TierBlocks("hbm", 20))
        answer(cluster, pools, PoolHeartbeat(Epoch(5), 0, tiers))
        shown = (await ask(stage, "GET", path_of(worker)))[1]
        assert shown["load"] == {
            "num_running": 3, "num_queued": 2, "num_used_tokens": 50, "max_tokens": 200, "step_age_s": 7.5
        }  # fmt: skip
        assert (shown["state"], "7.5 s" in shown["reason"]) == ("suspect", True)
        assert (await stage.post("/generate", ANY))[0] == 200, "no other instance is ready"
        async with stage.client.get(stage.url("/metrics")) as response:
            text = await response.text()
        of = f'instance="{name_of(worker)}"'
        for line in (
            f'instance_requests{{{of},what="running"}} 3.0',
            f'instance_requests{{{of},what="queued"}} 2.0',
            f"instance_kv_usage{{{of}}} 0.25",
            f"instance_step_age_seconds{{{of}}} 7.5",
            f'pool_blocks{{{of},state="cached",tier="dram"}} 30.0',
            f'pool_blocks{{{of},state="free",tier="dram"}} 4.0',
            f'pool_blocks{{{of},state="cached",tier="hbm"}} 20.0',
            'instances{role="colocated",state="suspect"} 1.0',
        ):
            assert f"memserve_router_{line}" in text, line


@pytest.mark.parametrize("url", ["http://a b", "http://a?b", "http://me:pw@a", "ftp://a", "http://", 5, None])
async def test_a_url_that_names_no_server_is_not_added(url: object) -> None:
    async with staged() as stage:
        status, answer = await stage.post("/workers", {"url": url})
        assert (status, answer["error"]["param"]) == (400, "url")
        assert not (await stage.get("/workers"))[1]["workers"]


async def test_a_server_is_one_under_every_spelling_of_its_url() -> None:
    async with staged() as stage:
        spellings = ["http://localhost:9/a", "http://LOCALHOST:9/a/"]
        got = [(await stage.post("/workers", {"url": url}))[0] for url in spellings]
        assert got == [201, 200]
        assert (await stage.get(f"/workers/{spellings[1]}"))[0] == 200
        async with stage.client.delete(stage.url(f"/workers/{spellings[1]}")) as response:
            assert response.status == 200
        assert not (await stage.get("/workers"))[1]["workers"]

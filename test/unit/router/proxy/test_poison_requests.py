"""A request that ends its servers is rejected before it reaches all servers."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.crashes import Crashes
from memserve.router.errors import UpstreamDisconnected, UpstreamError, UpstreamFault
from memserve.router.proxy.retry import find_crash, find_poison
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import info_of, staged
from .retry_harness import Ask, metric

GREEDY = {"temperature": 0}


def lost(name: str, role: str = "decode", *, was_sent: bool = True) -> UpstreamFault:
    return UpstreamDisconnected(InstanceId(name), Epoch(1), role, "gone", was_sent=was_sent)


@pytest.mark.parametrize(
    ("faults", "is_harmful"),
    [
        ([lost("a")], False),
        ([lost("a"), lost("b")], True),
        ([lost("a"), lost("a")], False),
        ([lost("a"), lost("b", was_sent=False)], False),
        ([lost("a"), lost("b", "prefill")], False),
        ([lost("a"), lost("b", "prefill"), lost("c", "prefill")], True),
        ([lost("a"), UpstreamError(InstanceId("b"), "decode", 500, "")], False),
    ],
)
def test_find_poison_needs_two_lost_instances_of_one_role(
    faults: list[UpstreamFault], is_harmful: bool
) -> None:
    assert (find_poison(faults) is not None) is is_harmful


@pytest.mark.parametrize(
    ("sent_s", "was_sent", "name", "is_harmful"),
    [
        (9.0, True, "a", True),
        (7.0, True, "a", False),  # it was there for long before the crash
        (9.0, False, "a", False),
        (9.0, True, "killed from outside", False),
    ],
)
def test_request_that_came_just_before_a_crash_is_harmful(
    sent_s: float, was_sent: bool, name: str, is_harmful: bool
) -> None:
    crashes = Crashes(lambda: 10.0)
    crashes.add(InstanceId("a"), Epoch(1))
    fault = UpstreamDisconnected(
        InstanceId(name), Epoch(1), "prefill", "gone", was_sent=was_sent, sent_s=sent_s
    )
    assert (find_crash([fault], crashes, 2.0) is not None) is is_harmful


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.COLOCATED])
async def test_request_is_tried_on_no_other_server_after_one_crashed_with_it(
    role: Role, stream: bool
) -> None:
    others = [FakeWorker(one) for one in (Role.PREFILL, Role.DECODE) if Role.COLOCATED not in (role, one)]
    workers = [FakeWorker(role, script=Script(gates={0: asyncio.Event()})) for _ in range(3)]
    others = [one for one in others if one.role is not role]
    for other in others:
        other.script = Script(gates={0: asyncio.Event()})
    async with staged(*others, *workers, retry_initial_backoff_ms=1) as stage:
        ask = Ask(stage, body={"text": "poison", "stream": stream})
        await stage.until(lambda: any(one.requests for one in workers))
        (first,) = (one for one in workers if one.requests)
        info = info_of(first)
        stage.router.cluster.deregister(info.instance_id, info.epoch, has_crashed=True)
        status, answer = await ask.task
        error = json.loads(answer)["error"]
        assert (status, error["retryable"], error["code"]) == (502, False, "request_ended_servers")
        assert info.instance_id in error["message"]
        assert sum(len(one.requests) for one in workers) == 1
        assert await metric(stage, "memserve_router_harmful_total 1.0")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.COLOCATED])
async def test_poison_request_is_rejected_after_two_lost_servers(role: Role, stream: bool) -> None:
    others = [FakeWorker(one) for one in (Role.PREFILL, Role.DECODE) if Role.COLOCATED not in (role, one)]
    workers = [FakeWorker(role, script=Script(drop_before=0), is_mortal=True) for _ in range(4)]
    others = [one for one in others if one.role is not role]
    for other in others:
        other.script = Script(gates={0: asyncio.Event()})
    async with staged(*others, *workers, retry_initial_backoff_ms=1) as stage:
        status, answer = await Ask(stage, body={"text": "poison", "stream": stream}).task
        error = json.loads(answer)["error"]
        assert (status, error["retryable"], error["code"]) == (502, False, "request_ended_servers")
        reached = [one for one in workers if one.requests]
        assert len(reached) == 2
        assert all(f"{role}-{one.port}" in error["message"] for one in reached)
        assert await metric(stage, "memserve_router_harmful_total 1.0")
        for other in others:
            await other.until(lambda w: all(one.dropped for one in w.requests))


async def test_poison_stream_is_not_resumed_after_two_lost_servers() -> None:
    workers = [FakeWorker(script=Script(drop_before=1), is_mortal=True) for _ in range(3)]
    async with staged(*workers, retry_initial_backoff_ms=1) as stage:
        body = {"text": "poison", "stream": True, "sampling_params": GREEDY}
        status, answer = await Ask(stage, body=body).task
        error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
        assert (status, error["retryable"], error["code"]) == (200, False, "request_ended_servers")
        assert sum(len(one.requests) for one in workers) == 2


async def test_unreachable_servers_do_not_make_a_poison_request() -> None:
    workers = [FakeWorker() for _ in range(3)]
    async with staged(*workers, policy="round_robin", retry_initial_backoff_ms=1) as stage:
        for worker in workers[:2]:
            await worker.kill()
        for _ in range(2):
            assert (await Ask(stage).task)[0] == 200
        assert await metric(stage, "memserve_router_harmful_total 0.0")


@pytest.mark.parametrize("is_heard", [False, True])
async def test_surviving_servers_do_not_make_a_poison_request(is_heard: bool) -> None:
    """The connections broke, but a probe finds the servers again, or they send heartbeats."""
    requests = itertools.count()

    class Cut(FakeWorker):
        async def _answer(self, request: Any, received: Any) -> Any:
            if next(requests) >= 2:
                return await FakeWorker._answer(self, request, received)
            self.healthy = not is_heard
            request.transport.abort()
            raise asyncio.CancelledError

    workers = [Cut() for _ in range(3)]
    async with staged(*workers, retry_initial_backoff_ms=1) as stage:
        ask = Ask(stage, body={"text": "hello"})
        if is_heard:
            await stage.until(lambda: sum(not one.healthy for one in workers) == 2)
            for worker in workers:
                info = info_of(worker)
                stage.router.cluster.heartbeat(info.instance_id, info.epoch)
        assert (await ask.task)[0] == 200
        assert sum(len(one.requests) for one in workers) == 3
        assert await metric(stage, "memserve_router_harmful_total 0.0")


async def test_servers_of_unknown_status_count_for_a_poison_request() -> None:
    workers = [FakeWorker(script=Script(drop_before=0)) for _ in range(3)]
    async with staged(*workers, retry_initial_backoff_ms=1, heartbeat_secs=0.3) as stage:
        for worker in workers:
            worker.healthy = False
        status, answer = await Ask(stage, body={"text": "poison"}).task
        assert (status, json.loads(answer)["error"]["code"]) == (502, "request_ended_servers")
        assert sum(len(one.requests) for one in workers) == 2


async def test_unresponsive_servers_do_not_make_a_poison_request() -> None:
    gate = asyncio.Event()
    workers = [FakeWorker(Role.COLOCATED, script=Script(gates={0: gate})) for _ in range(3)]
    async with staged(*workers, retry_initial_backoff_ms=1) as stage:
        ask = Ask(stage, body={"text": "hello"})
        silent: set[str] = set()
        for _ in range(2):
            await stage.until(lambda: any(one.requests and one.url not in silent for one in workers))
            one = next(one for one in workers if one.requests and one.url not in silent)
            silent.add(one.url)
            stage.router.cluster.on_unresponsive(one.url, "no heartbeat")
        await stage.until(lambda: all(one.requests for one in workers))
        gate.set()
        assert (await ask.task)[0] == 200

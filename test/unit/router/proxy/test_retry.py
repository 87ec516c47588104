"""Retries: a request survives failed instances as long as its client has received nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.breaker import BreakerState
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.proxy.retry import RetryPolicy, backoff_s, retry_candidates
from memserve.router.server_info import ServerInfo
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, staged
from .retry_harness import Ask, metric, state, texts

LONG_MS = 60_000
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES = [
    ("/generate", {"text": "hello"}),
    ("/generate", {"text": ["a", "b"]}),
    ("/generate", {"text": "hello", "sampling_params": {"n": 2}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"]}),
]
"""With 1, 2, 2, 1, 2 and 2 answers of "Hello, world"."""


# ---- the policy


def policy(draw: float = 1.0, **settings: Any) -> RetryPolicy:
    return RetryPolicy(**{"initial_backoff_s": 0.05, "max_backoff_s": 0.3, **settings}, draw=lambda: draw)


def test_backoff_doubles_up_to_a_limit() -> None:
    forever = policy(max_retries=10_000)
    assert [backoff_s(forever, n, 9.0) for n in (1, 2, 3, 4, 9999)] == pytest.approx(
        [0.05, 0.1, 0.2, 0.3, 0.3]
    )


def test_backoff_jitter_takes_up_to_half() -> None:
    assert backoff_s(policy(0.0), 1, 9.0) == pytest.approx(0.025)
    assert backoff_s(policy(0.5), 1, 9.0) == pytest.approx(0.0375)


def test_backoff_is_none_when_retries_or_time_run_out() -> None:
    assert backoff_s(policy(max_retries=3), 3, 9.0) is not None
    assert backoff_s(policy(max_retries=3), 4, 9.0) is None
    assert backoff_s(policy(max_retries=0), 1, 9.0) is None
    assert backoff_s(policy(), 1, 0.04) is None, "it would be over before"


def test_retry_candidates_put_failed_instances_last() -> None:
    names = [InstanceId(name) for name in "abc"]
    a, b, c = (
        Instance(name, Epoch(1), Role.COLOCATED, f"http://{name}:1", None, ServerInfo("m", "/m"))
        for name in names
    )
    got = [snapshot.colocated for snapshot in retry_candidates(ClusterSnapshot.of([a, b, c]), names[:2])]
    assert got == [(c,), (a, c), (a, b, c)]


# ---- with workers


def team() -> list[FakeWorker]:
    return [FakeWorker(role) for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)]


async def victim_of(stage: Stage, role: Role) -> FakeWorker:
    """The worker of `role` that got the request."""
    workers = stage.workers[role]
    await stage.until(lambda: any(one.requests for one in workers))
    return next(one for one in workers if one.requests)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_request_of_a_killed_pair_is_retried_on_another(
    path: str, body: dict[str, Any], role: Role, stream: bool
) -> None:
    async with staged(*team()) as stage:
        hold = asyncio.Event()
        for worker in stage.workers[role]:
            worker.script = Script(gates={0: hold})
        if role is Role.PREFILL:  # as a real decode waits for its prefill
            for worker in stage.workers[Role.DECODE]:
                worker.script = Script(gates={0: hold})
        ask = Ask(stage, path, {**body, "stream": stream})
        victim = await victim_of(stage, role)
        await victim.kill()
        await stage.until(lambda: any(w.requests for w in stage.workers[role] if w is not victim))
        hold.set()
        status, answer = await ask.task
        assert status == 200, answer
        assert ask.headers["x-memserve-attempts"] == "2"
        expected = 1 if body in ({"text": "hello"}, CHAT) else 2
        assert texts(answer, stream) == ["Hello, world"] * expected
        assert await metric(stage, 'memserve_router_retries_total{reason="lost"} 1.0')

        requests = [one for worker in stage.workers[Role.PREFILL] for one in worker.requests]
        requests += [one for worker in stage.workers[Role.DECODE] for one in worker.requests]
        names = {json.dumps(one.rids) for one in requests}
        rooms = {json.dumps(one.body["bootstrap_room"]) for one in requests}
        assert len(names) == len(rooms) >= 2, "each attempt is new to the servers"


async def test_both_legs_are_aborted_before_a_retry() -> None:
    workers = [FakeWorker(Role.PREFILL), FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)]
    async with staged(*workers) as stage:
        hold = asyncio.Event()
        for worker in workers:
            worker.script = Script(gates={0: hold})
        ask = Ask(stage)
        victim = await victim_of(stage, Role.PREFILL)
        await stage.decode.until(lambda w: w.requests)
        await victim.kill()
        await stage.decode.until(lambda w: len(w.requests) == 2)
        first, second = stage.decode.requests
        assert first.dropped
        hold.set()
        assert (await ask.task)[0] == 200
        await stage.decode.until(lambda w: w.aborts)
        assert not any(second.rids[0].startswith(rid) for rid in stage.decode.aborts)


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_of_a_retry_has_the_clients_rid(stream: bool) -> None:
    async with staged(FakeWorker(), FakeWorker(), policy="round_robin") as stage:
        bad, good = stage.workers[Role.COLOCATED]
        bad.script = Script(status=500)
        while not bad.requests:
            ask = Ask(stage, body={"text": ["a", "b"], "rid": ["x", "y"], "stream": stream})
            status, answer = await ask.task
            assert status == 200
            words = ("x", "y", *good.requests[-1].rids)
            assert {word for word in words if f'"{word}"' in answer} == {"x", "y"}
        names = [name for one in (*bad.requests, *good.requests) for name in one.rids]
        assert len(set(names)) == len(names)


class _FailingInStream(FakeWorker):
    """SGLang answers a stream that fails before its first token with 200 and an error event."""

    async def _answer(self, request: Any, received: Any) -> Any:
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        error = {"error": {"message": "broken", "code": 500}}
        await response.write(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@pytest.mark.parametrize("role", [Role.COLOCATED, Role.DECODE])
async def test_stream_that_fails_inside_a_200_is_retried(role: Role) -> None:
    workers = [_FailingInStream(role), FakeWorker(role)]
    workers += [FakeWorker(Role.PREFILL)] if role is Role.DECODE else []
    async with staged(*workers, policy="round_robin") as stage:
        while not workers[0].requests:
            status, answer = await Ask(stage, body={"text": "hello", "stream": True}).task
            assert (status, texts(answer, True)) == (200, ["Hello, world"])
        assert await metric(stage, 'memserve_router_retries_total{reason="failed"} 1.0')


async def test_sampled_stream_that_has_begun_is_not_retried() -> None:
    async with staged(FakeWorker(), FakeWorker()) as stage:
        workers = stage.workers[Role.COLOCATED]
        for worker in workers:
            worker.script = Script(drop_before=1)
        status, answer = await Ask(stage, body={"text": "hello", "stream": True}).task
        assert (status, answer.count("data: ")) == (200, 2)
        assert '"retryable":true' in answer
        assert sum(len(one.requests) for one in workers) == 1


@pytest.mark.parametrize("max_retries", [0, 3])
async def test_last_error_tells_the_number_of_attempts(max_retries: int) -> None:
    settings = {"retry_max_retries": max_retries, "retry_initial_backoff_ms": 1}
    async with staged(FakeWorker(), FakeWorker(), **settings) as stage:
        workers = stage.workers[Role.COLOCATED]
        for worker in workers:
            worker.script = Script(status=500, message="out of luck")
        ask = Ask(stage)
        status, answer = await ask.task
        error = json.loads(answer)["error"]
        assert (status, error["retryable"]) == (502, True)
        assert "out of luck" in error["message"]
        assert ("attempt 4" in error["message"]) is (max_retries == 3)
        assert ask.headers.get("x-memserve-attempts") == ("4" if max_retries else None)
        assert sum(len(one.requests) for one in workers) == max_retries + 1


async def test_client_that_leaves_during_a_backoff_ends_the_request() -> None:
    settings = {"retry_initial_backoff_ms": LONG_MS, "retry_max_backoff_ms": LONG_MS}
    async with staged(FakeWorker(), cb_failure_threshold=1, **settings) as stage:
        stage.colocated.script = Script(status=500)
        ask = Ask(stage)
        await stage.until(lambda: state(stage, stage.colocated) is BreakerState.OPEN)
        ask.task.cancel()
        async with asyncio.timeout(5):
            while not await metric(stage, 'requests_total{path="/generate",status="499"} 1.0'):
                pass
        assert len(stage.colocated.requests) == 1


async def test_request_whose_time_ends_before_the_retry_fails_at_once() -> None:
    settings = {"retry_initial_backoff_ms": LONG_MS, "retry_max_backoff_ms": LONG_MS}
    async with staged(FakeWorker(), request_timeout_secs=5.0, **settings) as stage:
        stage.colocated.script = Script(status=500, message="out of luck")
        status, answer = await asyncio.wait_for(Ask(stage).task, 2.0)
        assert (status, "out of luck" in answer) == (502, True)


async def test_time_limit_covers_all_attempts() -> None:
    async with staged(FakeWorker(), FakeWorker(), request_timeout_secs=0.3, policy="round_robin") as stage:
        bad, slow = stage.workers[Role.COLOCATED]
        bad.script, slow.script = Script(status=500), Script(gates={0: asyncio.Event()})
        asks = [Ask(stage), Ask(stage)]
        for ask in asks:
            status, answer = await ask.task
            assert (status, json.loads(answer)["error"]["retryable"]) == (504, True)
        assert (len(bad.requests), len(slow.requests)) == (1, 2)
        await slow.until(lambda w: all(one.dropped for one in w.requests))


async def test_retry_reaches_the_only_worker_after_its_restart() -> None:
    async with staged(FakeWorker(), retry_initial_backoff_ms=500) as stage:
        worker = stage.colocated
        worker.script = Script(gates={0: asyncio.Event()})
        ask = Ask(stage)
        await worker.until(lambda w: w.requests)
        await worker.kill()
        worker.script = Script()
        await worker.start()
        status, answer = await asyncio.wait_for(ask.task, 2.0)
        assert (status, texts(answer, False)) == (200, ["Hello, world"])


async def test_request_fails_soon_if_its_only_worker_stays_dead() -> None:
    async with staged(FakeWorker()) as stage:
        stage.colocated.script = Script(gates={0: asyncio.Event()})
        ask = Ask(stage)
        await stage.colocated.until(lambda w: w.requests)
        await stage.colocated.kill()
        status, answer = await asyncio.wait_for(ask.task, 1.0)
        assert (status, "was lost" in answer) == (503, True)
        assert "x-memserve-attempts" not in ask.headers

"""Circuit breakers: when an instance gets no requests, and when it gets them again."""

from __future__ import annotations

import asyncio

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.breaker import Breakers, BreakerState
from memserve.router.cluster.config import HealthConfig
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.server_info import ServerInfo
from memserve.testing.fake_answers import Script
from memserve.testing.fake_clock import FakeClock
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import info_of, staged
from ..proxy.retry_harness import Ask, metric, state

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
THRESHOLD, TIMEOUT_S = 3, 2.0


def instance(name: str, role: Role = Role.COLOCATED, epoch: int = 1) -> Instance:
    return Instance(InstanceId(name), Epoch(epoch), role, f"http://{name}:1", None, ServerInfo("m", "/m"))


A, B = instance("a"), instance("b")
PREFILL, DECODE = instance("p", Role.PREFILL), instance("d", Role.DECODE)
OTHER_DECODE = instance("e", Role.DECODE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breakers(clock: FakeClock) -> Breakers:
    return Breakers(HealthConfig(cb_failure_threshold=THRESHOLD, cb_timeout_secs=TIMEOUT_S), clock)


def state_of(breakers: Breakers, one: Instance = A) -> BreakerState:
    return breakers.state(one.instance_id, one.epoch)


def open_for(breakers: Breakers, *instances: Instance) -> None:
    for one in instances:
        for _ in range(THRESHOLD):
            breakers.failed(one)


def test_breaker_opens_only_after_consecutive_faults(breakers: Breakers) -> None:
    for _ in range(5):
        breakers.failed(A)
        breakers.failed(A)
        assert state_of(breakers) is CLOSED
        breakers.answered(A)
    open_for(breakers, A)
    assert state_of(breakers) is OPEN
    assert state_of(breakers, B) is CLOSED


def test_half_open_breaker_admits_one_request_at_a_time(breakers: Breakers, clock: FakeClock) -> None:
    both = ClusterSnapshot.of([A, B])
    open_for(breakers, A)
    assert breakers.admitted(both) == ClusterSnapshot.of([B])
    clock.advance(TIMEOUT_S)
    assert state_of(breakers) is HALF_OPEN
    assert breakers.admitted(both) is both
    breakers.sent(A)
    assert breakers.admitted(both) == ClusterSnapshot.of([B]), "until it has answered"
    breakers.answered(A)
    assert state_of(breakers) is CLOSED
    assert breakers.admitted(both) is both


def test_fault_reopens_a_half_open_breaker(breakers: Breakers, clock: FakeClock) -> None:
    open_for(breakers, A)
    clock.advance(TIMEOUT_S)
    breakers.sent(A)
    clock.advance(TIMEOUT_S / 2)
    breakers.failed(A)
    clock.advance(TIMEOUT_S * 0.9)
    assert state_of(breakers) is OPEN


def test_half_open_breaker_admits_again_after_a_request_without_outcome(
    breakers: Breakers, clock: FakeClock
) -> None:
    """Its client left, say."""
    open_for(breakers, A)
    clock.advance(TIMEOUT_S)
    breakers.sent(A)
    clock.advance(TIMEOUT_S)
    assert state_of(breakers) is HALF_OPEN


def test_open_breaker_admits_if_no_other_instance_can_serve(breakers: Breakers) -> None:
    pair = ClusterSnapshot.of([PREFILL, DECODE])
    open_for(breakers, A, B, DECODE)
    assert breakers.admitted(ClusterSnapshot.of([A, B])) == ClusterSnapshot.of([A, B])
    assert breakers.admitted(pair) == pair
    assert breakers.admitted(ClusterSnapshot.of([PREFILL, DECODE, OTHER_DECODE])) == ClusterSnapshot.of(
        [PREFILL, OTHER_DECODE]
    )


def test_breaker_prefers_a_colocated_instance_to_an_incomplete_pair(breakers: Breakers) -> None:
    open_for(breakers, DECODE)
    admitted = breakers.admitted(ClusterSnapshot.of([PREFILL, DECODE, A]))
    assert (admitted.colocated, admitted.decodes) == ((A,), ())


def test_breaker_of_a_new_process_is_closed(breakers: Breakers) -> None:
    open_for(breakers, A)
    restarted = instance("a", epoch=2)
    assert state_of(breakers, restarted) is CLOSED
    breakers.retain([(restarted.instance_id, restarted.epoch)])
    assert state_of(breakers) is CLOSED, "forgotten"


# ---- with workers


async def test_router_retries_elsewhere_and_then_avoids_a_failing_worker() -> None:
    settings = {"policy": "round_robin", "cb_timeout_secs": 600.0, "retry_initial_backoff_ms": 1}
    async with staged(FakeWorker(), FakeWorker(), **settings) as stage:
        bad, good = stage.workers[Role.COLOCATED]
        bad.script = Script(status=500)
        for _ in range(30):
            assert (await Ask(stage).task)[0] == 200
        assert (len(bad.requests), len(good.requests)) == (5, 30)
        assert state(stage, bad) is BreakerState.OPEN
        line = f'memserve_router_breakers{{instance="{info_of(bad).instance_id}",state="open"}} 1.0'
        assert await metric(stage, line)
        workers = (await stage.get("/workers"))[1]["workers"]
        assert [one["breaker"] for one in workers] == ["open", "closed"]
        await good.kill()
        bad.script = Script()
        assert (await Ask(stage).task)[0] == 200, "nobody else is there"
        assert state(stage, bad) is BreakerState.CLOSED


async def test_recovered_worker_gets_requests_again() -> None:
    settings = {"policy": "round_robin", "cb_timeout_secs": 0.05, "cb_failure_threshold": 1}
    async with staged(FakeWorker(), FakeWorker(), **settings) as stage:
        bad, _ = stage.workers[Role.COLOCATED]
        bad.script = Script(status=503)
        while not bad.requests:
            assert (await Ask(stage).task)[0] == 200
        bad.script = Script()
        await stage.until(lambda: state(stage, bad) is BreakerState.HALF_OPEN)
        while state(stage, bad) is not BreakerState.CLOSED:
            assert (await Ask(stage).task)[0] == 200
        assert len(bad.requests) == 2


async def test_breaker_ignores_errors_of_the_client() -> None:
    async with staged(FakeWorker(), cb_failure_threshold=1) as stage:
        stage.colocated.script = Script(status=400, message="too long")
        for number in range(3):
            status, answer = await Ask(stage).task
            assert (status, "too long" in answer) == (400, True)
            assert len(stage.colocated.requests) == number + 1, "once is enough"
        stage.colocated.script = Script(gates={0: asyncio.Event()})
        leaving = Ask(stage)
        await stage.colocated.until(lambda w: len(w.requests) == 4)
        leaving.task.cancel()
        await stage.colocated.until(lambda w: w.requests[3].dropped)
        assert state(stage, stage.colocated) is BreakerState.CLOSED


async def test_breaker_counts_a_lost_connection_once() -> None:
    async with staged(FakeWorker(), cb_failure_threshold=2, retry_max_retries=0) as stage:
        stage.colocated.script = Script(gates={0: asyncio.Event()})
        asks = [Ask(stage) for _ in range(5)]
        await stage.colocated.until(lambda w: len(w.requests) == 5)
        await stage.colocated.kill()
        assert {(await ask.task)[0] for ask in asks} == {503}
        assert state(stage, stage.colocated) is BreakerState.CLOSED

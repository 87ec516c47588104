"""The controller admits requests in order and never loses or keeps a slot."""

from __future__ import annotations

import asyncio
import time

import pytest

from memserve.core.memory import total_memory_bytes
from memserve.router.admission.controller import AdmissionController, ByteBudget, default_bytes
from memserve.router.admission.fair_queue import FairQueue
from memserve.router.errors import Overloaded, failure_of
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.tenant import SOLE_TENANT, Rates, Tenant


class Bench:
    """A controller, and requests that hold their slot until their event is set."""

    def __init__(self, max_running: int, max_waiting: int = 10, queue_timeout_s: float = 10.0) -> None:
        self.metrics = RouterMetrics()
        admission = FairQueue(max_running, max_waiting, time.monotonic)
        self.controller = AdmissionController(
            admission, queue_timeout_s=queue_timeout_s, metrics=self.metrics
        )
        self.begun: list[str] = []

    def ask(self, name: str, until: asyncio.Event, tenant: Tenant = SOLE_TENANT) -> asyncio.Task[None]:
        async def work() -> None:
            async with self.controller.admitted(tenant):
                self.begun.append(name)
                await until.wait()

        return asyncio.create_task(work())

    def shows(self, line: str) -> bool:
        return line in self.metrics.exposition().decode().splitlines()


async def settle() -> None:
    """Run the event loop until nothing is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_controller_starts_the_next_request_when_one_ends() -> None:
    bench, first, second = Bench(1), asyncio.Event(), asyncio.Event()
    one, two = bench.ask("one", first), bench.ask("two", second)
    await settle()
    assert bench.begun == ["one"]
    assert bench.shows("memserve_router_queued_requests 1.0")
    first.set()
    await one
    await settle()
    assert bench.begun == ["one", "two"]
    second.set()
    await two
    assert bench.shows("memserve_router_admitted_requests 0.0")
    assert bench.shows("memserve_router_queue_seconds_count 1.0")


async def test_controller_refuses_after_the_queue_timeout_with_503_and_retry_after() -> None:
    bench, never = Bench(1, queue_timeout_s=0.01), asyncio.Event()
    one = bench.ask("one", never)
    with pytest.raises(Overloaded) as caught:
        await bench.ask("two", never)
    failure = failure_of(caught.value)
    assert (failure.status, failure.error["retryable"]) == (503, True)
    assert int(failure.headers()["Retry-After"]) >= 1
    assert bench.shows('memserve_router_refused_total{reason="queue_timeout"} 1.0')
    never.set()
    await one


async def test_controller_refuses_a_full_queue_and_an_exceeded_rate_with_429() -> None:
    bench, never = Bench(1, 0), asyncio.Event()
    one = bench.ask("one", never)
    with pytest.raises(Overloaded) as full:
        await bench.ask("two", never)
    never.set()
    await one
    slow = Tenant("slow", Rates(rps=0.1))
    await bench.ask("three", never, slow)
    with pytest.raises(Overloaded) as fast:
        await bench.ask("four", never, slow)
    assert [failure_of(one.value).status for one in (full, fast)] == [429, 429]
    assert failure_of(fast.value).headers()["Retry-After"] == "10"


@pytest.mark.parametrize("num_ticks", range(4))
async def test_cancelled_waiter_releases_a_slot_granted_concurrently(num_ticks: int) -> None:
    bench, first, never = Bench(1), asyncio.Event(), asyncio.Event()
    one = bench.ask("one", first)
    two, three = bench.ask("two", never), bench.ask("three", never)
    await settle()
    first.set()
    for _ in range(num_ticks):
        await asyncio.sleep(0)
    two.cancel()
    await asyncio.wait([one, two])
    await settle()
    assert bench.begun[-1] == "three"
    assert bench.controller.queue.num_running == 1
    never.set()
    await three
    assert bench.controller.queue.num_running == 0


def test_admission_with_free_slots_never_yields_to_the_event_loop() -> None:
    """No task, no future: entering and leaving never yield to the event loop. There is none here."""
    controller = AdmissionController(
        FairQueue(2, 2, time.monotonic), queue_timeout_s=1.0, metrics=RouterMetrics()
    )
    admitted = controller.admitted(SOLE_TENANT)
    with pytest.raises(StopIteration):
        admitted.__aenter__().send(None)
    with pytest.raises(StopIteration):
        admitted.__aexit__(None, None, None).send(None)


async def test_a_failed_request_releases_its_slot() -> None:
    bench = Bench(1, 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with bench.controller.admitted(SOLE_TENANT):
                raise ZeroDivisionError


def test_byte_budget_grants_up_to_its_limit() -> None:
    budget = ByteBudget(10)
    assert budget.try_take(6)
    assert not budget.try_take(5)
    assert budget.try_take(4)
    budget.give(6)
    assert budget.held == 4
    assert budget.try_take(6)


def test_the_default_byte_budget_is_a_quarter_of_the_memory() -> None:
    assert default_bytes() == total_memory_bytes() // 4 > 1 << 20

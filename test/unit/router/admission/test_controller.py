"""Requests are let in one after another, and never lose or keep a slot."""

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


class Door:
    """A gate, and requests that hold their place until they are told to end."""

    def __init__(self, max_running: int, max_waiting: int = 10, queue_timeout_s: float = 10.0) -> None:
        self.metrics = RouterMetrics()
        admission = FairQueue(max_running, max_waiting, time.monotonic)
        self.gate = AdmissionController(admission, queue_timeout_s=queue_timeout_s, metrics=self.metrics)
        self.begun: list[str] = []

    def ask(self, name: str, until: asyncio.Event, tenant: Tenant = SOLE_TENANT) -> asyncio.Task[None]:
        async def work() -> None:
            async with self.gate.admitted(tenant):
                self.begun.append(name)
                await until.wait()

        return asyncio.create_task(work())

    def shows(self, line: str) -> bool:
        return line in self.metrics.exposition().decode().splitlines()


async def settle() -> None:
    """Let all run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_ends_and_the_next_begins() -> None:
    door, first, second = Door(1), asyncio.Event(), asyncio.Event()
    one, two = door.ask("one", first), door.ask("two", second)
    await settle()
    assert door.begun == ["one"]
    assert door.shows("memserve_router_queued_requests 1.0")
    first.set()
    await one
    await settle()
    assert door.begun == ["one", "two"]
    second.set()
    await two
    assert door.shows("memserve_router_admitted_requests 0.0")
    assert door.shows("memserve_router_queue_seconds_count 1.0")


async def test_who_waits_too_long_is_told_503_and_when_to_come_again() -> None:
    door, never = Door(1, queue_timeout_s=0.01), asyncio.Event()
    one = door.ask("one", never)
    with pytest.raises(Overloaded) as caught:
        await door.ask("two", never)
    failure = failure_of(caught.value)
    assert (failure.status, failure.error["retryable"]) == (503, True)
    assert int(failure.headers()["Retry-After"]) >= 1
    assert door.shows('memserve_router_refused_total{reason="queue_timeout"} 1.0')
    never.set()
    await one


async def test_a_full_queue_and_a_rate_are_told_429() -> None:
    door, never = Door(1, 0), asyncio.Event()
    one = door.ask("one", never)
    with pytest.raises(Overloaded) as full:
        await door.ask("two", never)
    never.set()
    await one
    slow = Tenant("slow", Rates(rps=0.1))
    await door.ask("three", never, slow)
    with pytest.raises(Overloaded) as fast:
        await door.ask("four", never, slow)
    assert [failure_of(one.value).status for one in (full, fast)] == [429, 429]
    assert failure_of(fast.value).headers()["Retry-After"] == "10"


@pytest.mark.parametrize("num_ticks", range(4))
async def test_who_leaves_while_it_is_called_in_takes_no_slot_along(num_ticks: int) -> None:
    door, first, never = Door(1), asyncio.Event(), asyncio.Event()
    one = door.ask("one", first)
    two, three = door.ask("two", never), door.ask("three", never)
    await settle()
    first.set()
    for _ in range(num_ticks):
        await asyncio.sleep(0)
    two.cancel()
    await asyncio.wait([one, two])
    await settle()
    assert door.begun[-1] == "three"
    assert door.gate.queue.num_running == 1
    never.set()
    await three
    assert door.gate.queue.num_running == 0


def test_while_there_is_room_nothing_is_waited_for() -> None:
    """No task, no future: entering and leaving never give the loop a turn. There is none here."""
    gate = AdmissionController(FairQueue(2, 2, time.monotonic), queue_timeout_s=1.0, metrics=RouterMetrics())
    admitted = gate.admitted(SOLE_TENANT)
    with pytest.raises(StopIteration):
        admitted.__aenter__().send(None)
    with pytest.raises(StopIteration):
        admitted.__aexit__(None, None, None).send(None)


async def test_a_failed_request_leaves_its_slot() -> None:
    door = Door(1, 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with door.gate.admitted(SOLE_TENANT):
                raise ZeroDivisionError


def test_a_budget_gives_what_it_has() -> None:
    budget = ByteBudget(10)
    assert budget.try_take(6)
    assert not budget.try_take(5)
    assert budget.try_take(4)
    budget.give(6)
    assert budget.held == 4
    assert budget.try_take(6)


def test_the_default_byte_budget_is_a_quarter_of_the_memory() -> None:
    assert default_bytes() == total_memory_bytes() // 4 > 1 << 20

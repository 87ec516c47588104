"""The fair queue is fair between tenants, bounded, and ordered by priority within a tenant."""

from __future__ import annotations

import random
from collections import Counter
from heapq import heappop, heappush

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.router.admission.fair_queue import FairQueue, Refusal, TenantQueue, Waiter
from memserve.router.tenant import Rates
from memserve.testing.fake_clock import FakeClock


class Hall:
    """A fair queue whose requests the test ends."""

    def __init__(self, max_running: int | None, max_waiting: int = 100, rates: Rates | None = None) -> None:
        self.clock = FakeClock()
        self.queue = FairQueue(max_running, max_waiting, self.clock, rates=rates)
        self.tenants: dict[str, TenantQueue] = {}
        self.running: list[tuple[TenantQueue, float]] = []
        self.waiting: list[Waiter] = []
        self.refused: list[Waiter] = []

    def ask(self, name: str, priority: int = 0, rates: Rates | None = None) -> str:
        """running or waiting; raises Refusal."""
        tenant = self.queue.tenant(name, rates or Rates())
        began_s = self.queue.enter(tenant)
        if began_s is not None:
            self.running.append((tenant, began_s))
            return "running"
        waiter: Waiter

        def settled() -> None:
            self.waiting.remove(waiter)
            if waiter.began_s is not None:
                self.running.append((waiter.tenant, waiter.began_s))
            else:
                self.refused.append(waiter)

        waiter = self.queue.wait(tenant, priority, settled)
        self.waiting.append(waiter)
        return "waiting"

    def end(self, name: str | None = None) -> None:
        """End the oldest running request, of any tenant or of `name`."""
        one = next(one for one in self.running if name in (None, one[0].name))
        self.running.remove(one)
        self.queue.leave(*one)

    def names(self) -> list[str]:
        return [tenant.name for tenant, _ in self.running]


def test_fair_queue_starts_requests_at_once_while_slots_are_free() -> None:
    hall = Hall(2)
    assert [hall.ask("a") for _ in range(3)] == ["running", "running", "waiting"]
    hall.end()
    assert hall.queue.num_running == 2
    assert hall.queue.num_waiting == 0


def test_fair_queue_without_a_bound_starts_every_request() -> None:
    hall = Hall(None)
    assert {hall.ask("a") for _ in range(1000)} == {"running"}


def test_fair_queue_serves_a_small_tenant_beside_a_crowd() -> None:
    hall = Hall(2)
    for _ in range(50):
        hall.ask("crowd")
    hall.clock.advance(10)
    hall.ask("guest")
    hall.end()
    assert hall.names() == ["crowd", "guest"]


def test_fair_queue_owes_a_late_tenant_nothing_from_before() -> None:
    hall = Hall(1, 1000)
    for _ in range(400):
        hall.ask("early")
    for _ in range(100):
        hall.clock.advance(1)
        hall.end()
    for _ in range(100):
        hall.ask("late")
    served = Counter[str]()
    for _ in range(40):
        hall.clock.advance(1)
        hall.end()
        served[hall.names()[0]] += 1
    assert abs(served["early"] - served["late"]) <= 2, served


def test_fair_queue_forgets_slot_time_from_before_the_queue_filled() -> None:
    hall = Hall(2)
    hall.ask("a")
    hall.clock.advance(1000)
    hall.ask("b")
    hall.end("a")
    hall.ask("a")  # runs again, and there is no queue
    for name in ("b", "a", "b", "a"):
        hall.ask(name)
    served = Counter[str]()
    for _ in range(4):
        hall.clock.advance(1)
        hall.end()
        served[hall.names()[-1]] += 1
    assert served == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("slots", "seconds", "weights"),
    [
        (4, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1, "b": 1, "c": 1}),
        (1, {"a": 1.0, "b": 1.0}, {"a": 3, "b": 1}),
        (8, {"a": 1.0, "b": 1.0}, {"a": 3, "b": 1}),
        (8, {"long": 20.0, "short": 0.5}, {"long": 1, "short": 1}),
        (1, {"long": 20.0, "short": 0.5}, {"long": 1, "short": 1}),
    ],
)
def test_fair_queue_shares_slots_by_time_and_weight(
    slots: int, seconds: dict[str, float], weights: dict[str, float]
) -> None:
    """All tenants always have waiting requests."""
    draw = random.Random(1)
    hall = Hall(slots, 1000)
    rates = {name: Rates(weight=weight) for name, weight in weights.items()}
    for _ in range(slots + 5):
        for name in seconds:
            hall.ask(name, rates=rates[name])
    ends: list[tuple[float, int]] = []
    known: dict[int, tuple[TenantQueue, float]] = {}
    had = Counter[str]()
    number = 0
    while hall.clock.now_s < 1000 + 4000:
        for one in hall.running:
            if not any(one is other for other in known.values()):
                known[number] = one
                lasts_s = seconds[one[0].name] * draw.uniform(0.5, 1.5)
                heappush(ends, (hall.clock.now_s + lasts_s, number))
                number += 1
        end_s, ended = heappop(ends)
        tenant, began_s = known.pop(ended)
        hall.clock.now_s = end_s
        had[tenant.name] += end_s - began_s
        hall.running = [
            one for one in hall.running if one is not (tenant, began_s) and one != (tenant, began_s)
        ]
        hall.queue.leave(tenant, began_s)
        hall.ask(tenant.name, rates=rates[tenant.name])
    total = sum(weights.values())
    for name, weight in weights.items():
        assert had[name] / had.total() == pytest.approx(weight / total, rel=0.1), had


def test_fair_queue_orders_by_priority_within_a_tenant_only() -> None:
    hall = Hall(1)
    for name, priority in (("x", 0), ("a", 0), ("a", 5), ("a", 5), ("b", 0), ("a", -1)):
        hall.ask(name, priority)
    order = []
    while hall.waiting:
        before = [(waiter.tenant.name, -waiter.rank[0], waiter) for waiter in hall.waiting]
        hall.clock.advance(1)
        hall.end()
        order.append(next((name, priority) for name, priority, one in before if one not in hall.waiting))
    assert [priority for name, priority in order if name == "a"] == [5, 5, 0, -1]
    assert order.index(("b", 0)) <= 1, "a's priorities do not come before b"


def test_fair_queue_is_bounded_and_refuses_with_a_retry_time() -> None:
    hall = Hall(2, 3)
    for _ in range(5):
        hall.ask("a")
    with pytest.raises(Refusal) as caught:
        hall.ask("a")
    assert caught.value.reason == "queue_full"
    assert caught.value.after_s == pytest.approx(4 * 1.0 / 2)
    assert hall.queue.num_waiting == 3


def test_fair_queue_of_size_zero_refuses_at_once() -> None:
    hall = Hall(1, 0)
    hall.ask("a")
    with pytest.raises(Refusal, match="queue_full"):
        hall.ask("b")


def test_full_fair_queue_drops_a_request_of_the_longest_sub_queue() -> None:
    hall = Hall(1, 4)
    for _ in range(5):
        hall.ask("crowd")
    for _ in range(2):
        hall.ask("guest")
    assert [waiter.tenant.name for waiter in hall.refused] == ["crowd", "crowd"]
    with pytest.raises(Refusal):
        hall.ask("guest")
    assert Counter(waiter.tenant.name for waiter in hall.waiting) == {"crowd": 2, "guest": 2}
    assert all(waiter.rank[1] > 2 for waiter in hall.refused), "the last ones yield"


def test_full_fair_queue_drops_a_tenants_own_lower_priority_first() -> None:
    hall = Hall(1, 2)
    for priority in (0, 0, 1):
        hall.ask("a", priority)
    hall.ask("a", 2)
    assert [-waiter.rank[0] for waiter in hall.refused] == [0]
    with pytest.raises(Refusal):
        hall.ask("a", 1)


def test_fair_queue_never_settles_an_abandoned_waiter() -> None:
    hall = Hall(1)
    hall.ask("a")
    hall.ask("a")
    hall.ask("a")
    first = hall.waiting.pop(0)
    hall.queue.abandon(first)
    hall.end()
    assert first.began_s is None
    assert hall.queue.num_running == 1
    assert hall.queue.num_waiting == 0


def test_rate_limit_admits_a_burst_and_gives_the_exact_wait() -> None:
    hall, rates = Hall(None), Rates(rps=4)
    for _ in range(4):
        hall.ask("a", rates=rates)
    with pytest.raises(Refusal) as caught:
        hall.ask("a", rates=rates)
    assert (caught.value.reason, caught.value.after_s) == ("requests", pytest.approx(0.25))
    hall.ask("b")
    hall.clock.advance(caught.value.after_s)
    hall.ask("a", rates=rates)
    with pytest.raises(Refusal):
        hall.ask("a", rates=rates)


def test_token_rate_is_charged_afterwards_and_refilled_over_time() -> None:
    hall, rates = Hall(None), Rates(tps=100)
    hall.ask("a", rates=rates)
    hall.queue.charge(hall.running[0][0], 1100)
    with pytest.raises(Refusal) as caught:
        hall.ask("a", rates=rates)
    assert (caught.value.reason, caught.value.after_s) == ("tokens", pytest.approx(10.01))
    hall.clock.advance(10.02)
    hall.ask("a", rates=rates)


def test_rate_limit_for_all_tenants_counts_every_tenant() -> None:
    hall = Hall(None, rates=Rates(rps=2))
    hall.ask("a")
    hall.ask("b")
    with pytest.raises(Refusal, match="requests"):
        hall.ask("c")


def test_new_tenant_rates_apply_at_once() -> None:
    hall = Hall(None)
    hall.ask("a", rates=Rates(rps=1))
    with pytest.raises(Refusal):
        hall.ask("a", rates=Rates(rps=1))
    hall.ask("a", rates=Rates(rps=5))
    hall.ask("a")


class AdmissionModel(RuleBasedStateMachine):
    """Bounds hold, no request is lost, and no slot is free while a request waits."""

    def __init__(self) -> None:
        super().__init__()
        self.hall = Hall(3, 5)
        self.num_asked = self.num_ended = self.num_refused = self.num_abandoned = 0

    @rule(name=st.sampled_from("abc"), priority=st.integers(-1, 1), weight=st.sampled_from([1.0, 2.5]))
    def ask(self, name: str, priority: int, weight: float) -> None:
        self.num_asked += 1
        try:
            self.hall.ask(name, priority, Rates(weight=weight))
        except Refusal:
            self.num_refused += 1

    @rule(which=st.integers(0, 10), seconds=st.floats(0, 100))
    def end(self, which: int, seconds: float) -> None:
        if self.hall.running:
            self.hall.clock.advance(seconds)
            self.hall.queue.leave(*self.hall.running.pop(which % len(self.hall.running)))
            self.num_ended += 1

    @rule(which=st.integers(0, 10))
    def abandon(self, which: int) -> None:
        if self.hall.waiting:
            self.hall.queue.abandon(self.hall.waiting.pop(which % len(self.hall.waiting)))
            self.num_abandoned += 1

    @invariant()
    def holds(self) -> None:
        hall = self.hall
        assert hall.queue.num_running == len(hall.running) <= 3
        assert hall.queue.num_waiting == len(hall.waiting) <= 5
        assert len(hall.running) == 3 or not hall.waiting
        gone = self.num_ended + self.num_refused + self.num_abandoned + len(hall.refused)
        assert self.num_asked == len(hall.running) + len(hall.waiting) + gone


TestAdmissionModel = AdmissionModel.TestCase
TestAdmissionModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

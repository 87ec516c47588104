"""Who is given no requests as it fails them, and when again."""

from __future__ import annotations

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.breaker import Breakers, BreakerState
from memserve.router.instance import Facts, Instance, Snapshot
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import Role

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
THRESHOLD, TIMEOUT_S = 3, 2.0


def instance(name: str, role: Role = Role.COLOCATED, epoch: int = 1) -> Instance:
    return Instance(InstanceId(name), Epoch(epoch), role, f"http://{name}:1", None, Facts("m", "/m"))


A, B = instance("a"), instance("b")
PREFILL, DECODE = instance("p", Role.PREFILL), instance("d", Role.DECODE)
OTHER_DECODE = instance("e", Role.DECODE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breakers(clock: FakeClock) -> Breakers:
    return Breakers(threshold=THRESHOLD, timeout_s=TIMEOUT_S, clock=clock)


def state(breakers: Breakers, one: Instance = A) -> BreakerState:
    return breakers.state(one.instance_id, one.epoch)


def open_for(breakers: Breakers, *instances: Instance) -> None:
    for one in instances:
        for _ in range(THRESHOLD):
            breakers.failed(one)


def test_only_faults_in_a_row_open_it(breakers: Breakers) -> None:
    for _ in range(5):
        breakers.failed(A)
        breakers.failed(A)
        assert state(breakers) is CLOSED
        breakers.answered(A)
    open_for(breakers, A)
    assert state(breakers) is OPEN
    assert state(breakers, B) is CLOSED


def test_half_open_it_is_given_one_request_at_a_time(breakers: Breakers, clock: FakeClock) -> None:
    both = Snapshot.of([A, B])
    open_for(breakers, A)
    assert breakers.admitted(both) == Snapshot.of([B])
    clock.advance(TIMEOUT_S)
    assert state(breakers) is HALF_OPEN
    assert breakers.admitted(both) is both
    breakers.sent(A)
    assert breakers.admitted(both) == Snapshot.of([B]), "until it has answered"
    breakers.answered(A)
    assert state(breakers) is CLOSED
    assert breakers.admitted(both) is both


def test_a_fault_opens_a_half_open_one_again(breakers: Breakers, clock: FakeClock) -> None:
    open_for(breakers, A)
    clock.advance(TIMEOUT_S)
    breakers.sent(A)
    clock.advance(TIMEOUT_S / 2)
    breakers.failed(A)
    clock.advance(TIMEOUT_S * 0.9)
    assert state(breakers) is OPEN


def test_a_request_without_an_outcome_blocks_nothing_for_ever(breakers: Breakers, clock: FakeClock) -> None:
    """Its client left, say."""
    open_for(breakers, A)
    clock.advance(TIMEOUT_S)
    breakers.sent(A)
    clock.advance(TIMEOUT_S)
    assert state(breakers) is HALF_OPEN


def test_an_open_one_serves_if_nobody_else_can(breakers: Breakers) -> None:
    pair = Snapshot.of([PREFILL, DECODE])
    open_for(breakers, A, B, DECODE)
    assert breakers.admitted(Snapshot.of([A, B])) == Snapshot.of([A, B])
    assert breakers.admitted(pair) == pair
    assert breakers.admitted(Snapshot.of([PREFILL, DECODE, OTHER_DECODE])) == Snapshot.of(
        [PREFILL, OTHER_DECODE]
    )


def test_a_pair_that_is_not_whole_gives_way_to_a_colocated_one(breakers: Breakers) -> None:
    open_for(breakers, DECODE)
    admitted = breakers.admitted(Snapshot.of([PREFILL, DECODE, A]))
    assert (admitted.colocated, admitted.decodes) == ((A,), ())


def test_a_new_process_begins_anew(breakers: Breakers) -> None:
    open_for(breakers, A)
    restarted = instance("a", epoch=2)
    assert state(breakers, restarted) is CLOSED
    breakers.keep([(restarted.instance_id, restarted.epoch)])
    assert state(breakers) is CLOSED, "forgotten"

"""Busy periods: the work of an instance that is never idle, and its time."""

from __future__ import annotations

import pytest

from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.busy_periods import ENOUGH, BusyPeriods
from memserve.scheduling.cost_model.model import GPU_COSTS, PrefillCost, Work
from memserve.scheduling.cost_model.online import OnlineCostModel

A, B = InstanceId("a"), InstanceId("b")
ONE = Work.of(100, 0)


def test_busy_period_lasts_from_the_first_request_until_none_is_left() -> None:
    busy = BusyPeriods()
    busy.sent(A, 1, 10.0)
    busy.sent(A, 2, 11.0)
    busy.sent(B, 3, 0.0)
    assert busy.done(A, 1, ONE, 12.0) is None
    busy.sent(A, 4, 12.5)
    assert busy.done(A, 2, ONE, 13.0) is None
    assert busy.done(A, 4, Work.of(50, 20), 14.0) == (Work(3, 230, 100**2 * 2 + 50**2 - 20**2), 4.0)
    assert busy.done(A, 4, ONE, 15.0) is None
    busy.sent(A, 5, 20.0)
    assert busy.done(A, 5, ONE, 21.0) is None, "a period of one request has no result"


def test_prefill_with_unknown_work_voids_its_busy_period_only() -> None:
    busy = BusyPeriods()
    for request in (1, 2):
        busy.sent(A, request, 0.0)
    assert busy.done(A, 1, None, 1.0) is None
    assert busy.done(A, 2, ONE, 2.0) is None
    for request in (3, 4):
        busy.sent(A, request, 3.0)
    assert busy.done(A, 3, ONE, 4.0) is None
    assert busy.done(A, 4, ONE, 5.0) == (ONE + ONE, 2.0)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_busy_period_without_idle_time_ends_between_batches(batch: int) -> None:
    busy = BusyPeriods()
    seen = Work(), 0.0
    periods = 0
    now_s = 100.0
    for request in range(batch):
        busy.sent(A, request, now_s)
    for first in range(0, 20 * batch, batch):
        now_s += batch
        for request in range(first, first + batch):
            busy.sent(A, request + batch, now_s)
            now_s += 0.001
            if (told := busy.done(A, request, ONE, now_s)) is not None:
                work, seconds = told
                assert ENOUGH <= work.num_prefills < ENOUGH + batch
                assert seconds == pytest.approx(work.num_prefills, rel=0.05)
                seen = seen[0] + work, seen[1] + seconds
                periods += 1
    assert periods >= 2
    assert seen[1] < now_s - 100


def test_busy_periods_forget_instances_that_left() -> None:
    busy = BusyPeriods()
    for request in (1, 2):
        busy.sent(A, request, 0.0)
    busy.retain(frozenset({B}))
    for request in (1, 2):
        assert busy.done(A, request, ONE, 1.0) is None


def test_prefill_costs_are_learned_from_busy_periods_alone() -> None:
    truth = PrefillCost(2e-2, 3e-4, 2e-9)
    costs = OnlineCostModel(GPU_COSTS)
    for round in range(60):
        work = Work()
        for i in range(ENOUGH):
            work += Work.of(600 + 200 * (i % 3) + 10 * round, 16 * ((i * round) % 30))
        costs.worked(work, work.seconds(truth))
    assert costs.model.exec_s(1500, 0) == pytest.approx(2e-2 + 0.45 + 4.5e-3, rel=0.05)
    assert costs.model.exec_s(1500, 1200) == pytest.approx(2e-2 + 0.09 + 1.6e-3, rel=0.2)

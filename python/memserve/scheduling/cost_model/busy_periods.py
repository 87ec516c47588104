"""The work of an instance over a period in which it is never idle: how costs are learned under load.

    sent ── sent ── done ── done ── sent ── done     from the first request until none is left,
    |<─────────────── seconds ────────────────>|     or between two batches, when there were enough

A request that failed, or did not report its cached tokens, makes its period useless.
Knows no clock: the time is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.model import Work

ENOUGH = 8
"""Prefills in a period that may end between batches: a half done prefill at either end counts for little."""
BETWEEN = 0.25
"""Prefills of one batch end together; the next batch ends later than this share of a prefill's time."""


@dataclass(slots=True)
class _Period:
    since_s: float
    waiting: set[int] = field(default_factory=set)
    work: Work = field(default_factory=Work)
    last_s: float = 0.0
    """When the last of the work was done."""
    is_spoilt: bool = False

    def is_over(self, now_s: float) -> bool:
        """Whether the prefill done last ended a batch, and the period has enough of them."""
        num = self.work.num_prefills
        return num >= ENOUGH and now_s - self.last_s > BETWEEN * (self.last_s - self.since_s) / num

    def result(self) -> tuple[Work, float] | None:
        """The work and its seconds; None if it cannot be used."""
        seconds = self.last_s - self.since_s
        if self.is_spoilt or self.work.num_prefills < 2 or not seconds > 0:
            return None
        return self.work, seconds


class BusyPeriods:
    """The current periods of all instances' prefills. One thread only."""

    def __init__(self) -> None:
        self._periods: dict[InstanceId, _Period] = {}

    def sent(self, instance: InstanceId, request: int, now_s: float) -> None:
        """The instance gets a request to prefill."""
        self._periods.setdefault(instance, _Period(now_s)).waiting.add(request)

    def done(
        self, instance: InstanceId, request: int, work: Work | None, now_s: float
    ) -> tuple[Work, float] | None:
        """The prefill of the request is over; `work` is None if it is not known. Idempotent.

        Returns the work and the seconds of a period that is over, if it has more than one request.
        """
        period = self._periods.get(instance)
        if period is None or request not in period.waiting:
            return None
        result = None
        if period.is_over(now_s):
            result = period.result()
            period = self._periods[instance] = _Period(period.last_s, period.waiting)
        period.waiting.remove(request)
        period.last_s = now_s
        if work is None:
            period.is_spoilt = True
        else:
            period.work += work
        if not period.waiting:
            del self._periods[instance]
            result = result or period.result()
        return result

    def retain(self, instances: frozenset[InstanceId]) -> None:
        """Forget all other instances."""
        for gone in self._periods.keys() - instances:
            del self._periods[gone]

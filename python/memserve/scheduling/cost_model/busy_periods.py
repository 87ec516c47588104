"""What an instance computes while it always has something to do: how costs are learnt under load.

    sent ── sent ── done ── done ── sent ── done     from the first request until none is left,
    |<─────────────── seconds ────────────────>|     or between two batches, when there were enough

A request that failed, or said too little of itself, spoils what was seen meanwhile.
Knows no clock: the time is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.model import Work

ENOUGH = 8
"""Prefills: at an end of the period one that is half done counts as not done, or as done."""
BETWEEN = 0.25
"""Prefills of one batch end together; the next one does not within this part of what one takes."""


@dataclass(slots=True)
class _Period:
    since_s: float
    waiting: set[int] = field(default_factory=set)
    work: Work = field(default_factory=Work)
    last_s: float = 0.0
    """When the last of the work was done."""
    is_spoilt: bool = False

    def is_over(self, now_s: float) -> bool:
        """Whether what was done last ended a batch, and that is enough."""
        num = self.work.num_prefills
        return num >= ENOUGH and now_s - self.last_s > BETWEEN * (self.last_s - self.since_s) / num

    def told(self) -> tuple[Work, float] | None:
        seconds = self.last_s - self.since_s
        if self.is_spoilt or self.work.num_prefills < 2 or not seconds > 0:
            return None
        return self.work, seconds


class BusyPeriods:
    """Of the prefills of all instances. One thread only."""

    def __init__(self) -> None:
        self._periods: dict[InstanceId, _Period] = {}

    def sent(self, instance: InstanceId, request: int, now_s: float) -> None:
        """The instance has something to do."""
        self._periods.setdefault(instance, _Period(now_s)).waiting.add(request)

    def done(
        self, instance: InstanceId, request: int, work: Work | None, now_s: float
    ) -> tuple[Work, float] | None:
        """The request's prefill is over, and was `work`, if that is known. Idempotent.

        Returns the work and the seconds of a period that is over, if it was of more than one request.
        """
        period = self._periods.get(instance)
        if period is None or request not in period.waiting:
            return None
        told = None
        if period.is_over(now_s):
            told = period.told()
            period = self._periods[instance] = _Period(period.last_s, period.waiting)
        period.waiting.remove(request)
        period.last_s = now_s
        if work is None:
            period.is_spoilt = True
        else:
            period.work += work
        if not period.waiting:
            del self._periods[instance]
            told = told or period.told()
        return told

    def keep(self, instances: frozenset[InstanceId]) -> None:
        """Forget all others."""
        for gone in self._periods.keys() - instances:
            del self._periods[gone]

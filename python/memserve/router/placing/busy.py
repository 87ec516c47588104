"""What an instance computes while it always has something to do: how costs are learnt under load.

    sent ── sent ── done ── done ── sent ── done     from the first request until none is left,
    |<─────────────── seconds ────────────────>|     or until so many that the ends count little

A request that failed, or said too little of itself, spoils what was seen meanwhile.
Knows no clock: the time is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memserve.core.ids import InstanceId
from memserve.router.costs.cost_model import Work

MANY = 8
"""Prefills. At an end of the period one that is half done counts as not done, or as done."""


@dataclass(slots=True)
class _Period:
    since_s: float
    waiting: set[int] = field(default_factory=set)
    work: Work = field(default_factory=Work)
    is_spoilt: bool = False


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
        """The request's prefill is over, and was `work`, if that is known.

        Returns the work and the seconds of a period that is over and was more than one request. Idempotent.
        """
        period = self._periods.get(instance)
        if period is None or request not in period.waiting:
            return None
        period.waiting.remove(request)
        if work is None:
            period.is_spoilt = True
        else:
            period.work += work
        if period.waiting and period.work.num_prefills < MANY:
            return None
        del self._periods[instance]
        if period.waiting:
            self._periods[instance] = _Period(now_s, period.waiting)
        seconds = now_s - period.since_s
        if period.is_spoilt or period.work.num_prefills < 2 or not seconds > 0:
            return None
        return period.work, seconds

    def keep(self, instances: frozenset[InstanceId]) -> None:
        """Forget all others."""
        for gone in self._periods.keys() - instances:
            del self._periods[gone]

"""Circuit breakers: an instance that fails several requests in a row gets no more for a while. Pure.

    closed ──`threshold` faults in a row──> open ──`timeout_s`──> half open ──an answer──> closed
                                              ^                       │ a request sent, or a fault
                                              └───────────────────────┘
`InstanceRegistry` takes out instances whose connection broke, until a probe succeeds. Breakers are for
instances that pass their probes and still fail requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import HealthConfig
from memserve.router.cluster.instance import ClusterSnapshot, Instance

logger = logging.getLogger(__name__)


class BreakerState(StrEnum):
    """Whether an instance gets requests."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """The next request is a trial."""


@dataclass(slots=True)
class _Breaker:
    num_faults: int = 0
    """Faults since the last answer."""
    try_s: float = 0.0
    """When an open breaker becomes half open."""


class Breakers:
    """One breaker per process. Event loop thread only."""

    def __init__(self, config: HealthConfig, clock: Callable[[], float]) -> None:
        self._threshold = config.cb_failure_threshold
        self._timeout_s = config.cb_timeout_secs
        self._clock = clock
        self._faulty: dict[tuple[InstanceId, Epoch], _Breaker] = {}

    def state(self, instance_id: InstanceId, epoch: Epoch) -> BreakerState:
        """The state of the breaker of that process."""
        breaker = self._faulty.get((instance_id, epoch))
        if breaker is None or breaker.num_faults < self._threshold:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < breaker.try_s else BreakerState.HALF_OPEN

    def admitted(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """The instances whose breaker is not open; all instances of a role in which every breaker is open, if
        no request could be served otherwise."""
        if not self._faulty or not any(self._is_open(one) for one in snapshot.all()):
            return snapshot
        kept = ClusterSnapshot.of(one for one in snapshot.all() if not self._is_open(one))
        if kept.unavailable_reason() is None:
            return kept
        return ClusterSnapshot(
            kept.prefills or snapshot.prefills,
            kept.decodes or snapshot.decodes,
            kept.colocated or snapshot.colocated,
        )

    def sent(self, instance: Instance) -> None:
        """Record a request to `instance`. A half-open breaker opens again until the request is answered."""
        if self.state(instance.instance_id, instance.epoch) is BreakerState.HALF_OPEN:
            self._faulty[instance.instance_id, instance.epoch].try_s = self._clock() + self._timeout_s

    def answered(self, instance: Instance) -> None:
        """Record that `instance` completed its share of a request: its breaker closes."""
        if self._faulty.pop((instance.instance_id, instance.epoch), None) is not None:
            logger.info("instance answers again instance=%s", instance.instance_id)

    def failed(self, instance: Instance) -> None:
        """Record a fault of `instance` itself, not of the client or another instance."""
        breaker = self._faulty.setdefault((instance.instance_id, instance.epoch), _Breaker())
        breaker.num_faults += 1
        if breaker.num_faults == self._threshold:
            logger.warning(
                "instance gets no requests, it failed %d in a row instance=%s",
                *(breaker.num_faults, instance.instance_id),
            )
        breaker.try_s = self._clock() + self._timeout_s

    def retain(self, processes: Iterable[tuple[InstanceId, Epoch]]) -> None:
        """Drop the breakers of all other processes."""
        for gone in self._faulty.keys() - set(processes):
            del self._faulty[gone]

    def _is_open(self, instance: Instance) -> bool:
        return self.state(instance.instance_id, instance.epoch) is BreakerState.OPEN

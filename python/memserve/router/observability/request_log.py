"""Keeps the records of recent requests for the dashboard, and counts each request's times.

One ring has all requests, a smaller one the failed ones, so that a flood of successful requests does not
displace them. Decisions are kept as records and explained on demand; prompts are not kept. Event loop thread
only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from memserve.router.observability.counting import Buckets
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.records import RequestRecord

FAULT = 500
"""Statuses from here on count as faults of the router or a server."""


class RequestLog:
    """The rings. See the module."""

    def __init__(self, metrics: RouterMetrics, kept: int = 1024, faults_kept: int = 128) -> None:
        self._metrics = metrics
        self._ended: deque[RequestRecord] = deque(maxlen=kept)
        self._faults: deque[RequestRecord] = deque(maxlen=faults_kept)
        self._by_path: dict[str, tuple[Buckets, Buckets, Buckets]] = {}

    def add(self, one: RequestRecord) -> None:
        """Record a request that has ended. About 1 µs."""
        self._ended.append(one)
        if one.status >= FAULT:
            self._faults.append(one)
        path = one.path
        counted = self._by_path.get(path)
        if counted is None:
            metrics = self._metrics
            counted = self._by_path[path] = (
                metrics.request_seconds.labels(path),
                metrics.first_token_seconds.labels(path),
                metrics.inter_token_seconds.labels(path),
            )
        took, first_token, inter_token = counted
        self._metrics.requests.labels(path, one.status).value += 1
        took.observe(one.seconds)
        first_s = one.first_token_s
        if first_s is not None:
            first_token.observe(first_s)
            if one.num_events > 1:
                inter_token.observe((one.seconds - first_s) / (one.num_events - 1))

    def newest(self, num: int, *, only_faults: bool = False) -> list[RequestRecord]:
        """At most `num` records, the newest first."""
        ring = self._faults if only_faults else self._ended
        return [one for one, _ in zip(reversed(ring), range(num), strict=False)]

    def find(self, name: str) -> RequestRecord | None:
        """The newest kept record with this rid or request id."""
        return next((one for one in self._all() if name in (one.rid, one.request_id)), None)

    def _all(self) -> Iterator[RequestRecord]:
        yield from reversed(self._ended)
        yield from reversed(self._faults)

"""Request rates, first-token times and hit ratio of the last two minutes, one point per second.

Computed from the counters, at no cost to requests. Event loop thread only; the time is passed in.
"""

from __future__ import annotations

from collections import deque

import msgspec

from memserve.router.observability.counting import quantile
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.request_log import FAULT
from memserve.router.records import SeriesPoint

NUM_POINTS = 120


class _Totals(msgspec.Struct, frozen=True):
    requests: float
    faults: float
    first_tokens: list[int]
    told_tokens: float
    cached_tokens: float


class LiveSeries:
    """The points. See the module."""

    def __init__(self, metrics: RouterMetrics, now_s: float) -> None:
        self._metrics = metrics
        self._points: deque[SeriesPoint] = deque(maxlen=NUM_POINTS)
        self._at_s = now_s
        self._totals = self._read()

    def points(self) -> list[SeriesPoint]:
        """All points, the oldest first."""
        return list(self._points)

    def tick(self, now_s: float) -> None:
        """Add a point if a second is over. Called several times per second."""
        seconds = now_s - self._at_s
        if seconds < 1.0:
            return
        before, now = self._totals, self._read()
        self._at_s, self._totals = now_s, now
        first = [a - b for a, b in zip(now.first_tokens, before.first_tokens, strict=True)]
        told = now.told_tokens - before.told_tokens
        bounds = self._metrics.first_token_seconds.bounds
        self._points.append(
            SeriesPoint(
                seconds,
                (now.requests - before.requests) / seconds,
                (now.faults - before.faults) / seconds,
                quantile(0.5, bounds, first),
                quantile(0.95, bounds, first),
                min(1.0, (now.cached_tokens - before.cached_tokens) / told) if told > 0 else None,
            )
        )

    def _read(self) -> _Totals:
        metrics = self._metrics
        ended = metrics.requests.by_labels()
        return _Totals(
            sum(ended.values()),
            sum(count for (_, status), count in ended.items() if isinstance(status, int) and status >= FAULT),
            metrics.first_token_seconds.totals(),
            metrics.told_tokens.value,
            metrics.cached_tokens.value,
        )

"""Everything that is remembered of requests, to be shown. A plain record of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.router.observability.hot_prefixes import HotPrefixes
from memserve.router.observability.live_series import LiveSeries
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.request_log import RequestLog


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Event loop thread only."""

    requests: RequestLog
    series: LiveSeries
    prefixes: HotPrefixes

    @classmethod
    def new(cls, metrics: RouterMetrics, now_s: float, *, keeps_samples: bool) -> Telemetry:
        """Nothing has been seen yet. The time is that of `tick`."""
        prefixes = HotPrefixes(now_s, keeps_samples=keeps_samples)
        return cls(RequestLog(metrics), LiveSeries(metrics, now_s), prefixes)

    def tick(self, now_s: float) -> None:
        """To be called a few times a second."""
        self.series.tick(now_s)
        self.prefixes.tick(now_s)

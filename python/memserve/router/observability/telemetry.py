"""The counters and recent records of requests, and the proxy's observer."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.router.observability.config import ObservabilityConfig
from memserve.router.observability.hot_prefixes import HotPrefixes
from memserve.router.observability.live_series import LiveSeries
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.request_log import RequestLog
from memserve.scheduling.context import Prompt


@dataclass(frozen=True, slots=True)
class Telemetry:
    """All parts together. Event loop thread only."""

    metrics: RouterMetrics
    requests: RequestLog
    series: LiveSeries
    prefixes: HotPrefixes

    @classmethod
    def new(cls, metrics: RouterMetrics, now_s: float, config: ObservabilityConfig) -> Telemetry:
        """Empty; `now_s` is of the clock of `tick`."""
        prefixes = HotPrefixes(
            now_s,
            keeps_samples=config.ui_show_prompts,
            max_keys=config.hot_prefixes,
            half_life_s=config.hot_prefix_half_life_secs,
        )
        requests = RequestLog(metrics, config.recent_requests, config.recent_faults)
        return cls(metrics, requests, LiveSeries(metrics, now_s), prefixes)

    def count_placed(self, prompt: Prompt, sample: str | None) -> None:
        """A request was placed for the first time; its text begins with `sample`, if that is kept."""
        self.prefixes.note(prompt, sample)

    def count_retry(self, reason: str) -> None:
        """A request is tried again."""
        self.metrics.retries.labels(reason).inc()

    def count_poison(self) -> None:
        """A request was rejected as a poison request."""
        self.metrics.harmful.inc()

    def count_resumed(self, outcome: str) -> None:
        """A broken stream was continued, repeated, refused, or diverged."""
        self.metrics.resumed.labels(outcome).inc()

    def tick(self, now_s: float) -> None:
        """Advance the series and the prefixes. Called several times per second."""
        self.series.tick(now_s)
        self.prefixes.tick(now_s)

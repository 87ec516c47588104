"""What the router counts of its requests, for Prometheus. Any part of it may count; none reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "RouterMetrics"]

PREFIX = "memserve_router"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class RouterMetrics:
    """The counters of one router. Those who see a request's way count it here."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", help, registry=self.registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests that have ended.", "path", "status")
        self.retries = counter("retries", "Requests done again as an instance was lost or failed.", "reason")
        self.placed = counter("placed", "Requests sent to an instance.", "instance", "role")
        self.unknown_tokens = counter(
            "unknown_tokens",
            "Requests placed by load and session only, as their tokens are not known.",
            "reason",
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts that were placed.")
        self.expected_tokens = counter(
            "expected_cached_tokens", "Tokens that the prompt tree said the chosen prefill has."
        )
        self.cached_tokens = counter("cached_tokens", "Tokens that prefill says it had, where it says so.")
        self.fetches = counter(
            "fetches",
            "Fetches before dispatch: whole, part, none of the blocks came, or impossible to ask for.",
            "outcome",
        )
        self.fetched_blocks = counter("fetched_blocks", "Blocks that prefills have by fetches.")
        self.fetch_seconds = histogram("fetch_seconds", "What requests waited for fetches.")
        self.prefill_seconds = histogram(
            "prefill_seconds", "From a request's dispatch to the end of its prefill."
        )
        self.regret_seconds = histogram(
            "regret_seconds",
            "How much longer a prefill took than the best other choice would have, as known then.",
        )
        self.prefill_seconds_error = Gauge(
            f"{PREFIX}_prefill_seconds_error",
            "Moving mean of |predicted - observed| / observed, queue included.",
            registry=self.registry,
        )

    def watch(self, collector: Collector) -> None:
        """Show also what `collector` tells whenever somebody looks."""
        self.registry.register(collector)

    def exposition(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self.registry)

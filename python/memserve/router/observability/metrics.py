"""The router's request metrics, in Prometheus' format. Other parts count through their own protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from memserve.core.block_addr import LOCAL_TIERS
from memserve.router.cluster.instance import Instance
from memserve.router.observability.counting import Counter, Gauge, Histogram
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.context import Prompt
from memserve.scheduling.prediction_error import PrefillReport

PREFIX = "memserve_router"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
DURATIONS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
"""Default bucket bounds of client-side durations, in seconds; fine enough for quantiles."""


class RouterMetrics:
    """The counters of one router."""

    def __init__(self, durations: tuple[float, ...] = DURATIONS) -> None:
        """`durations`: bucket bounds of client-side durations, in seconds."""
        self.registry = CollectorRegistry()
        self._counted: list[Counter | Gauge | Histogram] = []
        self._count_requests(durations)
        self._count_placing()
        self._count_refusals()
        self.registry.register(_Counted(self._counted))

    def _count_requests(self, durations: tuple[float, ...]) -> None:
        self.requests = self._counter("requests", "Requests that have ended.", "path", "status")
        self.retries = self._counter(
            "retries", "Requests retried because an instance was lost or failed.", "reason"
        )
        self.resumed = self._counter(
            "resumed",
            "Streams whose server was lost or failed: continued from the tokens they had, repeated from the "
            "prompt, refused (they end with an error), or diverged (the next server answered differently).",
            "outcome",
        )
        self.harmful = self._counter(
            "harmful", "Poison requests: rejected after several servers were lost with them."
        )
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's head to the end of its answer.", durations, "path"
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "From a request's head to the first byte of its stream; without a stream, to the end of its "
            "prefill, if that is known.",
            durations,
            "path",
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_seconds",
            "Mean time between two events of a stream, once per request.",
            durations,
            "path",
        )

    def _count_placing(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.placed = counter("placed", "Requests sent to an instance.", "instance", "role")
        self.unknown_tokens = counter(
            "unknown_tokens",
            "Requests placed by load and session only, because their tokens are not known.",
            "reason",
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of placed prompts.")
        self.expected_tokens = counter(
            "expected_cached_tokens", "Tokens that the chosen prefill had according to the prompt tree."
        )
        self.cached_tokens = counter("cached_tokens", "Tokens that the prefill reported as cached.")
        tiers = counter(
            "prompt_tokens_by_tier",
            "Tokens of placed prompts by their place according to the prompt tree: in the chosen prefill's "
            "HBM or DRAM, at an instance to fetch from (remote), or to be computed.",
            "tier",
        )
        self.told_tokens = counter(
            "told_prompt_tokens", "Prompt tokens of the requests whose prefill reported cached tokens."
        )
        self.tier_tokens = tuple(tiers.labels(tier.name.lower()) for tier in LOCAL_TIERS)
        self.remote_tokens, self.computed_tokens = tiers.labels("remote"), tiers.labels("computed")
        self.fetches = counter(
            "fetches",
            "Fetches before dispatch: whole, part or none of the blocks arrived, impossible, or shared "
            "(waited for another request's fetch).",
            "outcome",
        )
        self.fetched_blocks = counter("fetched_blocks", "Blocks that fetches brought to prefills.")
        self.fetch_seconds = histogram("fetch_seconds", "Time that requests waited for fetches.", _SECONDS)
        self.prefill_seconds = histogram(
            "prefill_seconds", "From a request's dispatch to the end of its prefill.", _SECONDS
        )
        self.regret_seconds = histogram(
            "regret_seconds",
            "Observed prefill time minus the predicted time of the best other choice, at least 0.",
            _SECONDS,
        )
        self.prefill_seconds_error = Gauge(
            f"{PREFIX}_prefill_seconds_error",
            "Moving mean of |predicted - observed| / observed, queue included.",
        )
        self._counted.append(self.prefill_seconds_error)

    def _count_refusals(self) -> None:
        self.refused = self._counter("refused", "Requests refused admission.", "reason")
        self.queue_seconds = self._histogram(
            "queue_seconds", "Time that queued requests waited for admission.", _SECONDS
        )

    def count_refusal(self, reason: str) -> None:
        """A request was refused admission."""
        self.refused.labels(reason).inc()

    def count_queued(self, seconds: float) -> None:
        """A request waited so long for a slot, or gave up."""
        self.queue_seconds.observe(seconds)

    def count_placement(self, instances: Sequence[Instance], assignment: Assignment) -> None:
        """Count a placed request, and the tokens of its prompt by where they are for its prefill."""
        prompt = assignment.prompt
        for instance in instances:
            self.placed.labels(instance.instance_id, instance.role).inc()
        self.prompt_tokens.inc(prompt.num_tokens)
        if prompt.unknown is not None:
            self.unknown_tokens.labels(prompt.unknown).inc()
        by_tier, remote = assignment.tokens_by_tier()
        cached = sum(by_tier)
        if cached or remote:
            self.expected_tokens.inc(cached)
            for counter, num_tokens in zip(self.tier_tokens, by_tier, strict=True):
                counter.inc(num_tokens)
            self.remote_tokens.inc(remote)
        self.computed_tokens.inc(prompt.num_tokens - cached - remote)

    def count_fetch(self, outcome: str, seconds: float | None = None, num_blocks: int = 0) -> None:
        """Count a fetch before dispatch: its outcome, its time if it took any, and the blocks it brought."""
        self.fetches.labels(outcome).inc()
        if seconds is not None:
            self.fetch_seconds.observe(seconds)
        if num_blocks:
            self.fetched_blocks.inc(num_blocks)

    def count_prefill(self, prompt: Prompt, cached_tokens: int | None, report: PrefillReport | None) -> None:
        """Count a prefill: its cached tokens, if reported, and its time, if known."""
        if cached_tokens is not None:
            self.cached_tokens.inc(cached_tokens)
            self.told_tokens.inc(prompt.num_tokens)
        if report is None:
            return
        self.prefill_seconds.observe(report.seconds)
        if report.error is not None:
            self.prefill_seconds_error.set(report.error)
        if report.regret_s is not None:
            self.regret_seconds.observe(report.regret_s)

    def show(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Export a gauge whose value is read at each scrape."""
        shown = prometheus_client.Gauge(f"{PREFIX}_{name}", help, registry=self.registry)
        shown.set_function(value)

    def watch(self, collector: Collector) -> None:
        """Export the families of `collector` at each scrape."""
        self.registry.register(collector)

    def exposition(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        counter = Counter(f"{PREFIX}_{name}", help, labels)
        self._counted.append(counter)
        return counter

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        histogram = Histogram(f"{PREFIX}_{name}", help, bounds, labels)
        self._counted.append(histogram)
        return histogram


class _Counted(Collector):
    """The families of all counters."""

    def __init__(self, counted: list[Counter | Gauge | Histogram]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        for one in self._counted:
            yield one.family()

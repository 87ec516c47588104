"""The counters export the same as prometheus_client for the same values."""

from __future__ import annotations

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from memserve.router.observability.counting import Buckets, Counter, Gauge, Histogram, quantile

BOUNDS = (0.1, 1.0, 10.0)


class One(Collector):
    def __init__(self, counted: Counter | Gauge | Histogram) -> None:
        self._counted = counted

    def collect(self) -> list[Metric]:
        return [self._counted.family()]


def told(counted: Counter | Gauge | Histogram) -> bytes:
    registry = CollectorRegistry()
    registry.register(One(counted))
    return generate_latest(registry)


def samples(text: bytes) -> list[bytes]:
    """Without the times of creation, which only the library tells."""
    return [line for line in text.splitlines() if b"_created" not in line]


def test_counter_exports_the_same_as_prometheus_client() -> None:
    registry = CollectorRegistry()
    theirs = prometheus_client.Counter("seen", "What was seen.", ["path", "status"], registry=registry)
    ours = Counter("seen", "What was seen.", ("path", "status"))
    for path, status in (("/a", 200), ("/a", 200), ('/"\n', 404)):
        theirs.labels(path, status).inc(2)
        ours.labels(path, status).inc(2)
    assert samples(told(ours)) == samples(generate_latest(registry))
    assert ours.total() == 6


def test_histogram_exports_the_same_as_prometheus_client() -> None:
    registry = CollectorRegistry()
    theirs = prometheus_client.Histogram("took", "Time.", ["path"], buckets=BOUNDS, registry=registry)
    ours = Histogram("took", "Time.", BOUNDS, ("path",))
    for path, value in (("/a", 0.1), ("/a", 0.2), ("/b", 5), ("/b", 11), ("/b", 0)):
        theirs.labels(path).observe(value)
        ours.labels(path).observe(value)
    # "0.1" is "0.1" to both, but what is whole is "1" here and "1.0" there: equal numbers to Prometheus
    theirs_said = [line.replace(b'.0"', b'"') for line in samples(generate_latest(registry))]
    assert samples(told(ours)) == theirs_said
    assert ours.totals() == [2, 1, 1, 1]


def test_metric_without_labels_is_exported_from_the_start() -> None:
    assert b"n_total 0.0" in told(Counter("n", "N."))
    gauge = Gauge("g", "G.")
    gauge.set(2)
    assert b"g 2.0" in told(gauge)
    assert b"h_count 0.0" in told(Histogram("h", "H.", BOUNDS))


def test_labels_refuse_another_number_of_values() -> None:
    for counted in (Counter("n", "N.", ("path",)), Histogram("h", "H.", BOUNDS, ("path",))):
        with pytest.raises(ValueError, match="path"):
            counted.labels("/a", 200)


@pytest.mark.parametrize(
    ("share", "counts", "value"),
    [
        (0.5, [0, 0, 0, 0], None),
        (0.5, [4, 0, 0, 0], 0.05),
        (0.5, [1, 2, 1, 0], 0.55),
        (1.0, [1, 1, 0, 0], 1.0),
        (0.9, [0, 0, 0, 3], 10.0),
    ],
)
def test_quantile_interpolates_in_its_bucket(share: float, counts: list[int], value: float | None) -> None:
    assert quantile(share, BOUNDS, counts) == (value if value is None else pytest.approx(value))


def test_histogram_counts_a_value_on_a_bound_below_it() -> None:
    buckets = Buckets(BOUNDS)
    for value in (0.1, 1.0, 1.0001):
        buckets.observe(value)
    assert buckets.counts == [1, 1, 1, 0]

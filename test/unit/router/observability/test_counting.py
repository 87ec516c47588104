"""Numbers that Prometheus reads: the same as its own client library would tell of the same values."""

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


def test_a_counter_tells_what_the_librarys_does() -> None:
    registry = CollectorRegistry()
    theirs = prometheus_client.Counter("seen", "What was seen.", ["path", "status"], registry=registry)
    ours = Counter("seen", "What was seen.", ("path", "status"))
    for path, status in (("/a", 200), ("/a", 200), ('/"\n', 404)):
        theirs.labels(path, status).inc(2)
        ours.labels(path, status).inc(2)
    assert samples(told(ours)) == samples(generate_latest(registry))
    assert ours.total() == 6


def test_a_histogram_tells_what_the_librarys_does() -> None:
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


def test_what_has_no_labels_is_told_from_the_start() -> None:
    assert b"n_total 0.0" in told(Counter("n", "N."))
    gauge = Gauge("g", "G.")
    gauge.set(2)
    assert b"g 2.0" in told(gauge)
    assert b"h_count 0.0" in told(Histogram("h", "H.", BOUNDS))


def test_labels_have_to_be_as_many_as_were_named() -> None:
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
def test_a_quantile_is_read_off_its_bucket(share: float, counts: list[int], value: float | None) -> None:
    assert quantile(share, BOUNDS, counts) == (value if value is None else pytest.approx(value))


def test_values_on_a_bound_count_below_it() -> None:
    buckets = Buckets(BOUNDS)
    for value in (0.1, 1.0, 1.0001):
        buckets.observe(value)
    assert buckets.counts == [1, 1, 1, 0]

"""Counters and histograms that cost a request next to nothing: plain numbers, read when somebody looks.

`prometheus_client`'s own take a lock and make strings for each change, some microseconds a request; these
have the same verbs and are turned into its families at scrape. Event loop thread only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric


class Count:
    """One number that grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Count `amount` more."""
        self.value += amount


class Counter(Count):
    """A number, or one for each combination of labels."""

    __slots__ = ("_children", "_help", "_labels", "_name")

    def __init__(self, name: str, help: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._name, self._help, self._labels = name, help, labels
        self._children: dict[tuple[object, ...], Count] = {}

    def labels(self, *values: object) -> Count:
        """The number for these values, in the order of the label names; it begins at 0."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {self._labels}, not {values}")
            child = self._children[values] = Count()
        return child

    def total(self) -> float:
        """Over all labels."""
        return sum(child.value for child in self._children.values()) if self._labels else self.value

    def by_labels(self) -> dict[tuple[object, ...], float]:
        """A copy of all numbers."""
        return {values: child.value for values, child in self._children.items()}

    def family(self) -> Metric:
        """As Prometheus knows it."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        if not self._labels:
            family.add_metric((), self.value)
        for values, child in list(self._children.items()):
            family.add_metric([str(value) for value in values], child.value)
        return family


class Gauge:
    """A number that was last set."""

    __slots__ = ("_help", "_name", "value")

    def __init__(self, name: str, help: str) -> None:
        self._name, self._help = name, help
        self.value = 0.0

    def set(self, value: float) -> None:
        """It is this now."""
        self.value = value

    def family(self) -> Metric:
        """As Prometheus knows it."""
        return GaugeMetricFamily(self._name, self._help, value=self.value)


class Buckets:
    """How many values were at most each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By the first bound that is not less; the last is of values above all."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Histogram(Buckets):
    """One histogram, or one for each combination of labels."""

    __slots__ = ("_children", "_help", "_labels", "_name")

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: tuple[str, ...] = ()) -> None:
        super().__init__(tuple(bounds))
        self._name, self._help, self._labels = name, help, labels
        self._children: dict[tuple[object, ...], Buckets] = {}

    def labels(self, *values: object) -> Buckets:
        """The histogram for these values, in the order of the label names."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {self._labels}, not {values}")
            child = self._children[values] = Buckets(self.bounds)
        return child

    def totals(self) -> list[int]:
        """The counts of all labels together; a copy."""
        parts = [child.counts for child in self._children.values()] if self._labels else [self.counts]
        return [sum(counts) for counts in zip(*parts, strict=True)] if parts else [0] * len(self.counts)

    def family(self) -> Metric:
        """As Prometheus knows it."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in self._parts():
            ends = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
            buckets = list(zip(ends, accumulate(child.counts), strict=True))
            family.add_metric([str(value) for value in values], buckets, child.sum)
        return family

    def _parts(self) -> Iterator[tuple[tuple[object, ...], Buckets]]:
        yield from list(self._children.items()) if self._labels else [((), self)]


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The value that this share of the counted ones is at most, by linear interpolation in its bucket.

    None if nothing was counted; the last bound if it is above all.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    before, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if before + count >= wanted:
            return low + (bound - low) * (wanted - before) / count
        before, low = before + count, bound
    return bounds[-1]

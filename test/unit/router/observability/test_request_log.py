"""Records of recent requests, the durations they add, and the series of the last minutes."""

from __future__ import annotations

from typing import Any

import pytest

from memserve.router.observability.live_series import NUM_POINTS, LiveSeries
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.request_log import RequestLog
from memserve.router.records import RequestRecord

PATH = "/generate"


def ended(rid: str = "rid", status: int = 200, **others: Any) -> RequestRecord:
    told = {"request_id": f"x-{rid}", "seconds": 2.0, "route": "one", "reason": "-", **others}
    return RequestRecord(1.0, PATH, rid, status=status, **told)


def value(metrics: RouterMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"memserve_router_{name}", labels)


def test_request_log_keeps_the_newest() -> None:
    log = RequestLog(RouterMetrics(), kept=3)
    for number in range(5):
        log.add(ended(str(number)))
    assert [one.rid for one in log.newest(10)] == ["4", "3", "2"]
    assert [one.rid for one in log.newest(1)] == ["4"]
    assert log.find("1") is None


def test_request_log_finds_by_rid_or_request_id() -> None:
    log = RequestLog(RouterMetrics())
    first, second = ended("again", seconds=1.0), ended("again", seconds=2.0)
    for one in (first, second, ended("other")):
        log.add(one)
    assert log.find("again") is second
    assert log.find("x-again") is second
    assert log.find("nobody's") is None


def test_request_log_keeps_faults_longer() -> None:
    log = RequestLog(RouterMetrics(), kept=3)
    fault = ended("bad", 502)
    log.add(fault)
    for number in range(5):
        log.add(ended(str(number), 400))
    assert log.newest(10, only_faults=True) == [fault]
    assert log.find("bad") is fault


def test_request_log_counts_durations() -> None:
    metrics = RouterMetrics()
    log = RequestLog(metrics)
    log.add(ended(first_token_s=0.5, num_events=4))
    log.add(ended(first_token_s=0.5, num_events=1))
    log.add(ended(status=429))
    assert value(metrics, "requests_total", path=PATH, status="200") == 2
    assert value(metrics, "requests_total", path=PATH, status="429") == 1
    assert value(metrics, "request_seconds_sum", path=PATH) == 6.0
    assert value(metrics, "time_to_first_token_seconds_count", path=PATH) == 2
    assert value(metrics, "inter_token_seconds_count", path=PATH) == 1
    assert value(metrics, "inter_token_seconds_sum", path=PATH) == pytest.approx(0.5)


def test_series_point_has_the_rates_of_its_second() -> None:
    metrics = RouterMetrics()
    log, series = RequestLog(metrics), LiveSeries(metrics, 10.0)
    for status in (200, 200, 200, 503):
        log.add(ended(status=status, first_token_s=0.1 if status == 200 else None))
    metrics.told_tokens.inc(400)
    metrics.cached_tokens.inc(100)
    series.tick(10.9)
    assert series.points() == []
    series.tick(12.0)
    series.tick(13.0)
    busy, idle = series.points()
    assert (busy.seconds, busy.requests_s, busy.faults_s, busy.hit_ratio) == (2.0, 2.0, 0.5, 0.25)
    assert busy.first_token_p50_s == pytest.approx(0.0875)
    assert (idle.requests_s, idle.first_token_p50_s, idle.hit_ratio) == (0.0, None, None)


def test_series_keeps_the_points_of_its_window() -> None:
    series = LiveSeries(RouterMetrics(), 0.0)
    for second in range(2 * NUM_POINTS):
        series.tick(float(second))
    assert len(series.points()) == NUM_POINTS

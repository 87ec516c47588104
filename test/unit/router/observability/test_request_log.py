"""The requests that ended lately, what they add to the numbers, and the last minutes second by second."""

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


def test_the_newest_are_kept() -> None:
    log = RequestLog(RouterMetrics(), kept=3)
    for number in range(5):
        log.add(ended(str(number)))
    assert [one.rid for one in log.newest(10)] == ["4", "3", "2"]
    assert [one.rid for one in log.newest(1)] == ["4"]
    assert log.find("1") is None


def test_one_is_found_by_either_of_its_names_the_last_one_first() -> None:
    log = RequestLog(RouterMetrics())
    first, second = ended("again", seconds=1.0), ended("again", seconds=2.0)
    for one in (first, second, ended("other")):
        log.add(one)
    assert log.find("again") is second
    assert log.find("x-again") is second
    assert log.find("nobody's") is None


def test_faults_outlast_a_flood_of_good_ones() -> None:
    log = RequestLog(RouterMetrics(), kept=3)
    fault = ended("bad", 502)
    log.add(fault)
    for number in range(5):
        log.add(ended(str(number), 400))
    assert log.newest(10, only_faults=True) == [fault]
    assert log.find("bad") is fault


def test_what_clients_waited_for_is_counted() -> None:
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


def test_a_second_tells_what_happened_in_it() -> None:
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


def test_the_series_is_as_long_as_its_window() -> None:
    series = LiveSeries(RouterMetrics(), 0.0)
    for second in range(2 * NUM_POINTS):
        series.tick(float(second))
    assert len(series.points()) == NUM_POINTS

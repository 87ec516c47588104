"""Reads the memory pool reports of a cluster's servers, and waits until the pools are idle.

For tests, benchmarks and the demo. Reads `GET /mempool` of each server.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Any

from memserve.testing.cluster import wait_for


def pool_reports(server_urls: Sequence[str]) -> list[dict[str, Any]]:
    """One report per scheduler of these servers; none for a server without a pool."""
    reports: list[dict[str, Any]] = []
    for url in server_urls:
        with urllib.request.urlopen(f"{url}/mempool", timeout=30) as answer:
            reports += json.load(answer)
    return reports


def exchanged_bytes(reports: Sequence[dict[str, Any]]) -> int:
    """Bytes of KV that the pools have exchanged: decode's returns to prefill, and prefill's fetches."""
    peers = [report["peers"] for report in reports if report["peers"]]
    return sum(each["bytes_pushed"] + each["bytes_fetched"] for each in peers)


def is_settled(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether all KV of ended requests is stored, and pushed to its receivers."""
    return all(
        report["linker"]["offloads_begun"] == report["linker"]["offloads"] and not report["outbox"]["waiting"]
        for report in reports
    )


def wait_pools_connected(server_urls: Sequence[str], timeout_s: float = 15) -> None:
    """Return when the pools of these servers know each other. Raises as `wait_settled`."""

    def are_connected() -> bool:
        reports = pool_reports(server_urls)
        return all(report["members"]["known"] >= len(reports) - 1 for report in reports)

    wait_for(are_connected, what="pools to know each other", timeout_s=timeout_s)


def wait_settled(server_urls: Sequence[str], timeout_s: float = 30) -> None:
    """Return when `is_settled` holds. Raises ClusterFailed after the timeout."""
    wait_for(lambda: is_settled(pool_reports(server_urls)), what="the pools to settle", timeout_s=timeout_s)

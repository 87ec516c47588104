"""What the servers of a cluster say of their memory pools, and when they have nothing left to do.

For tests, benchmarks and the demo. Reads `GET /mempool` of each server.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Any

from memserve.testing.cluster import wait_for


def pool_reports(server_urls: Sequence[str]) -> list[dict[str, Any]]:
    """One report per scheduler of these servers; a server without a pool has none."""
    reports: list[dict[str, Any]] = []
    for url in server_urls:
        with urllib.request.urlopen(f"{url}/mempool", timeout=30) as answer:
            reports += json.load(answer)
    return reports


def sent_home_bytes(reports: Sequence[dict[str, Any]]) -> int:
    """KV that decode has sent to prefill, or prefill has fetched from it: all that pools have exchanged."""
    peers = [report["peers"] for report in reports if report["peers"]]
    return sum(each["bytes_pushed"] + each["bytes_fetched"] for each in peers)


def is_settled(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether everything that requests have left behind is stored, and sent to where it belongs."""
    return all(
        report["linker"]["offloads_begun"] == report["linker"]["offloads"] and not report["outbox"]["waiting"]
        for report in reports
    )


def wait_acquainted(server_urls: Sequence[str], timeout_s: float = 15) -> None:
    """Return once each of these servers' pools knows at least the others. Raises as `wait_settled`."""

    def is_acquainted() -> bool:
        reports = pool_reports(server_urls)
        return all(report["members"]["known"] >= len(reports) - 1 for report in reports)

    wait_for(is_acquainted, what="pools to know each other", timeout_s=timeout_s)


def wait_settled(server_urls: Sequence[str], timeout_s: float = 30) -> None:
    """Return once `is_settled`. Raises ClusterFailed if that takes too long."""
    wait_for(lambda: is_settled(pool_reports(server_urls)), what="pools to come to rest", timeout_s=timeout_s)

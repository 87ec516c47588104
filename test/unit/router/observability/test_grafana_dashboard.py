"""The Grafana dashboard uses existing metrics and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memserve.core.ids import Epoch, InstanceId
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Load, PoolInfo, Role, TierBlocks

from ..harness import Stage, staged

ROOT = Path(__file__).parents[4]
DASHBOARD = ROOT / "deploy" / "grafana" / "memserve.json"
DOCS = ROOT / "docs" / "guides" / "observability.md"
PREFIX = "memserve_router_"
_METRIC = re.compile(rf"{PREFIX}\w+")
_BY = re.compile(r"by \(([\w, ]+)\)")
_MATCHED = re.compile(r"(\w+)(?:=~|!=|=)\"")
_SHOWN = re.compile(r"{{(\w+)}}")


def documented() -> set[str]:
    """The metrics that the table in the docs names."""
    rows = DOCS.read_text().partition("## Metrics")[2].partition("\n\n*First")[0].splitlines()
    cells = (row.split("|")[2] for row in rows if row.startswith("| ") and "metrics |" not in row)
    return {name for cell in cells for name in re.findall(r"`([a-z]+_\w+|breakers|instances)[`{]", cell)}


def targets() -> Iterator[tuple[str, str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]


async def labels_by_name(stage: Stage) -> dict[str, set[str]]:
    """Of every sample, and of every family that has none yet."""
    async with stage.client.get(stage.url("/metrics")) as response:
        text = await response.text()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        suffix = "_total" if family.type == "counter" else ""
        found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_dashboard_expressions_name_existing_metrics() -> None:
    worker = FakeWorker(Role.COLOCATED, cache_tokens=1 << 16)
    async with staged(worker) as stage:
        member = stage.router.cluster.members()[0]
        member.load = Load(1, 0, 1, 2, 0.0)
        info = PoolInfo(
            InstanceId("pool"), Epoch(1), Role.PREFILL, member.info.caching, "127.0.0.1:1", "layout"
        )
        stage.router.pools.register(info)
        stage.router.pools.heartbeat(info.epoch, 0, (TierBlocks("dram", 1, 2, 3),))
        await stage.until(stage.router.state.subscriptions.stats)
        await stage.events("/generate", {"input_ids": list(range(64)), "stream": True})
        known = await labels_by_name(stage)
    assert len(documented()) > 30
    assert {PREFIX + name for name in documented()} <= {name.removesuffix("_bucket") for name in known}
    for title, expression, legend in targets():
        names = _METRIC.findall(expression)
        assert names, title
        assert set(names) <= known.keys(), title
        said = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
        said |= set(_MATCHED.findall(expression)) | set(_SHOWN.findall(legend))
        has = set().union(*(known[name] for name in names))
        if has:  # what has happened already tells its labels
            assert said - {"le", "job"} <= has | {"reason", "outcome"}, title


def test_dashboard_shows_every_metric() -> None:
    shown = {name for _, expression, _ in targets() for name in _METRIC.findall(expression)}
    for needed in (
        *("requests_total", "request_seconds_bucket", "time_to_first_token_seconds_bucket"),
        *("inter_token_seconds_bucket", "queued_requests", "prompt_tokens_by_tier_total", "fetches_total"),
        *("breakers", "tree_precision", "tree_recall", "cost_error"),
    ):
        assert PREFIX + needed in shown


@pytest.mark.parametrize("field", ["gridPos", "type", "title", "id"])
def test_dashboard_panels_are_complete(field: str) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert all(field in panel for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
